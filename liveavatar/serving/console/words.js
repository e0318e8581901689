// Every word of the page, in English and Chinese. `data-t` in the HTML names a text, data-t-label an aria-label and title.

const WORDS = {
  skip: ["Skip to the live picture", "跳到实时画面"],
  forget: ["Forget key", "清除密钥"],
  welcome: ["Good to see you", "欢迎"],
  welcome_text: ["Enter a server key to meet the avatars. The first one is printed when the server starts for the first time.", "请输入服务器密钥。首个密钥在服务器第一次启动时打印。"],
  key: ["Server key", "服务器密钥"],
  key_note: ["Kept in this tab until you close it, and never shown again. Leave empty where the server asks for none.", "仅保存在本标签页，关闭即消失，不会再次显示。若服务器不要求密钥，请留空。"],
  enter: ["Enter", "进入"],
  key_wrong: ["This key does not open the server.", "密钥无效。"],
  stage: ["Stage", "舞台"], controls: ["Controls", "控制"], operator: ["Operator", "运维"],
  live_picture: ["Live picture of the avatar", "数字人实时画面"],
  ai: ["AI-generated", "AI 生成"],
  start: ["Start", "开始"], starting: ["Starting …", "正在启动…"], end: ["End session", "结束会话"],
  mute: ["Mute", "静音"], full: ["Full screen", "全屏"], level: ["Sound level", "音量"],
  off: ["Off", "未开始"], connecting: ["Connecting", "连接中"], listening: ["Listening", "聆听中"], speaking: ["Speaking", "说话中"],
  idle: ["Idle", "空闲"], thinking: ["Thinking", "思考中"],
  lost: ["Connection lost", "连接中断"], live: ["Live", "直播中"], closed: ["Closed", "已关闭"], failed: ["Failed", "失败"],
  who: ["Who speaks", "选择形象"], add: ["Add a face", "添加形象"],
  prompt: ["Prompt", "提示词"], prompt_hint: ["A calm person talking in a bright room …", "明亮的房间里，一个人平静地说话……"],
  apply: ["Apply", "应用"], applied: ["It holds from the next block on.", "将从下一个数据块起生效。"],
  speak: ["Let it speak", "让它说话"], text: ["Text", "文字"], text_hint: ["Write what the avatar should say …", "输入要说的话……"],
  speak_it: ["Speak", "朗读"], ask_it: ["Send", "发送"], ask_hint: ["Write what you want to say to the avatar …", "输入你想对它说的话……"],
  no_voice: ["This server has no voice: set speech.voice in its configuration.", "服务器未配置语音合成：请设置 speech.voice。"],
  no_session: ["Start a session first.", "请先开始会话。"],
  ctrl_enter: ["Ctrl + Enter", "Ctrl + Enter"],
  mic: ["Microphone", "麦克风"], sound_file: ["Audio file", "音频文件"], interrupt: ["Interrupt", "打断"],
  mic_insecure: ["Browsers give the microphone to https and localhost only.", "浏览器只在 https 或 localhost 下开放麦克风。"],
  mic_scope: ["This key may watch, but not speak.", "此密钥只能观看，不能发声。"],
  mic_refused: ["The browser gave no microphone.", "浏览器没有提供麦克风。"],
  mic_on: ["The avatar says what you say. Headphones avoid an echo.", "数字人会复述你说的话，建议佩戴耳机。"],
  mic_talk: ["The avatar listens and answers.", "数字人正在聆听并回答。"],
  conversation: ["Conversation", "对话"], conversation_note: ["It listens to the microphone and answers, instead of repeating.", "聆听麦克风并回答，而不是复述。"],
  first: ["First response", "首次响应"], silence: ["Time to silence", "静音用时"], heard: ["Heard", "已听到"], fps: ["Pictures / s", "帧率"],
  offset: ["A/V offset", "音画偏移"], glass: ["Server to eye", "端到端延迟"],
  file_sent: ["{name}: {seconds} s of speech queued.", "{name}：已排入 {seconds} 秒语音。"],
  ended: ["The session ended: {reason}.", "会话已结束：{reason}。"], sound_blocked: ["Click the picture to hear it.", "点击画面以播放声音。"],
  unreachable: ["The server does not answer.", "服务器无响应。"], ready: ["Ready", "就绪"], not_ready: ["Not ready", "未就绪"], draining: ["Draining", "正在排空"],
  tab_chain: ["Chain", "链路"], tab_health: ["History", "历史"], tab_sessions: ["Sessions", "会话"], tab_outputs: ["Destinations", "推流与录制"],
  tab_provenance: ["Provenance", "来源验证"], tab_log: ["Log", "日志"], tab_server: ["Server", "服务器"],
  tab_channels: ["Channels", "频道"], no_channels: ["No channels yet.", "暂无频道。"], new_channel: ["New channel", "新建频道"],
  edit: ["Edit", "编辑"], mode: ["Mode", "模式"], rundown: ["Schedule", "节目单"], add_entry: ["Add an entry", "添加条目"], says: ["It says", "播出"],
  at: ["At (empty: in turn)", "时间（留空按顺序）"], every: ["Again every, s", "重复间隔（秒）"], gap: ["Pause before each, s", "条目间隔（秒）"],
  late: ["At most late, s", "最多迟到（秒）"], loop: ["Again and again", "循环播放"], add_sound: ["Add a sound", "添加音频"],
  sounds_later: ["Sounds are added when the channel is there.", "频道创建后可添加音频。"], sound_of: ["Sound {number}, {seconds} s", "音频 {number}，{seconds} 秒"],
  filler_prompts: ["In between: prompts, one a line", "间歇提示词（每行一个）"], filler_turn: ["Each for, s", "每个持续（秒）"],
  add_output_row: ["Add a destination", "添加推流"], unchanged: ["unchanged", "不变"], remove: ["Remove", "移除"],
  webhook: ["Webhook for its events", "事件回调"], hook_hint: ["Your own server", "您自己的服务器"], secret: ["Secret (16 characters or more)", "密钥（至少 16 字符）"], unhook: ["No webhook any more", "不再回调"],
  c_on_air: ["On air", "播出中"], c_waiting: ["Waiting", "等待中"], c_off: ["Off air", "未播出"], uptime: ["On air for", "已播出"],
  says_now: ["Now", "当前"], says_next: ["Next", "下一个"], filler: ["in between", "间歇"], switch_it: ["Switch", "切换"],
  version: ["Version", "版本"], engine: ["Engine", "引擎"], you: ["You are", "当前身份"], may: ["You may", "权限"], features: ["It can also", "附加能力"],
  ice: ["STUN and TURN", "STUN 与 TURN"], codec: ["This browser decodes H.264", "本浏览器可解码 H.264"],
  limits: ["Limits of a key", "密钥限额"], snippets: ["To copy", "复制"], copy_it: ["Copy", "复制"],
  whep: ["Watch this session (WHEP)", "观看此会话（WHEP）"], yes: ["yes", "是"], no: ["no", "否"], none: ["none", "无"],
  l_sessions: ["sessions at once", "并发会话"], l_viewers: ["viewers of a session", "每会话观众"], l_image_bytes: ["portrait", "肖像大小"],
  l_audio_bytes: ["audio file", "音频文件"], l_audio_seconds: ["speech that may wait", "可排队语音"],
  l_idle_seconds: ["idle before the end", "空闲上限"], l_length_seconds: ["longest session", "最长会话"],
  l_capacity: ["capacity of the chain", "链路容量"],
  need_admin: ["This needs a key with the scope admin.", "需要具有 admin 权限的密钥。"],
  head: ["Head", "主控"], rank: ["Rank {n}", "节点 {n}"], viewers: ["Receivers", "接收方"], playout: ["Playout", "播放"],
  speech_waiting: ["speech waiting", "待处理语音"], in_flight: ["{n} in the chain", "链路中 {n} 块"], ahead: ["ahead", "缓冲"],
  busy: ["busy", "负载"], blocks: ["{n} blocks", "{n} 块"], not_measured: ["not measured", "未测量"], queue: ["Queue", "队列"],
  realtime: ["Real-time factor", "实时系数"], capacity: ["Sessions", "会话"], restarts: ["Restarts", "重启"],
  degradation: ["Degradation step", "降级级别"], drops: ["Stale speech dropped", "丢弃的过期语音"], memory: ["Memory", "内存"],
  budget: ["Where the time goes", "延迟构成"],
  budget_note: ["Median from speech received to picture seen. Parts nobody measured are left out.", "从收到语音到看到画面的中位数；未测量的部分不显示。"],
  audio_wait: ["audio wait", "等待音频"], condition: ["condition", "条件编码"], steps: ["steps", "去噪"], decode: ["decode", "解码"], transit: ["transit", "传输"],
  play: ["playout", "播放缓冲"], encode: ["encode", "编码"], network: ["network", "网络"],
  previews: ["Denoising, step by step", "逐步去噪预览"],
  previews_note: ["The next block after each step: latents as colours by a fitted linear map, then the decoded picture.", "下一个数据块在每一步之后的样子：潜变量经线性拟合着色，最后是解码画面。"],
  look: ["Look", "查看"], keep_looking: ["Keep looking", "持续查看"], step: ["Step {n}", "第 {n} 步"], decoded: ["Decoded", "解码结果"],
  block: ["Block {n}", "数据块 {n}"],
  no_steps: ["This engine has no denoising steps: it is the test card, which paints its pictures.", "当前引擎是测试图，直接绘制画面，没有去噪步骤。"],
  h_factor: ["Real-time factor", "实时系数"], h_fps: ["Pictures / s", "帧率"], h_offset: ["A/V offset, ms", "音画偏移（毫秒）"],
  h_waiting: ["Speech waiting, s", "待处理语音（秒）"], h_ahead: ["Playout ahead, ms", "播放缓冲（毫秒）"], h_network: ["Network, ms", "网络（毫秒）"],
  h_busy: ["Busiest rank, %", "最忙节点（%）"], h_filler: ["Filler pictures / s", "补帧 / 秒"],
  minutes: ["15 minutes", "15 分钟"],
  owner: ["Owner", "所有者"], avatar: ["Avatar", "形象"], age: ["Age", "时长"], lease: ["Ends in", "剩余"], watch: ["Watch", "观看"],
  end_it: ["End", "结束"], sure: ["Sure?", "确定？"],
  state: ["State", "状态"], nothing: ["Nothing here yet.", "暂无内容。"], here: ["on stage", "当前"],
  kind: ["Kind", "类型"], url: ["Address", "地址"], url_hint: ["rtmp://host/app/stream-key", "rtmp://主机/应用/密钥"],
  token: ["Token (WHIP)", "令牌（WHIP）"], name: ["Name", "名称"],
  add_output: ["Start", "启动"], stop: ["Stop", "停止"], k_record: ["Recording", "录制"], k_rtmp: ["RTMP", "RTMP"], k_hls: ["HLS", "HLS"],
  k_whip: ["WHIP", "WHIP"],
  reconnects: ["Reconnects", "重连"], failures: ["Failures", "失败"], last_error: ["Last error", "最近错误"], rate: ["Rate", "码率"], sent: ["Sent", "已发送"],
  outputs_note: ["Stream keys and tokens are never shown again.", "推流密钥与令牌不会再次显示。"], copy: ["Copy address", "复制地址"], copied: ["Copied.", "已复制。"],
  verify: ["Was this made here?", "是否由本服务器生成？"],
  verify_note: ["Looks for this server's invisible watermark in the first two seconds of a video.", "在视频前两秒中查找本服务器的隐形水印。"],
  choose_video: ["Choose a video", "选择视频"], checking: ["Looking …", "检测中…"],
  found: ["Yes: it carries this server's watermark.", "是：带有本服务器的水印。"], not_found: ["No watermark of this server was found.", "未发现本服务器的水印。"],
  found_more: ["payload {payload}, {pictures} pictures, chance of a false alarm below {alarm}", "载荷 {payload}，{pictures} 帧，误报概率低于 {alarm}"],
  recordings: ["Recordings", "录制文件"], began: ["Began", "开始时间"], length: ["Length", "时长"], size: ["Size", "大小"], signed: ["Signed", "签名"],
  download: ["Download", "下载"],
  consents: ["Consents", "授权记录"], subject: ["Person", "本人"], scope: ["For", "用途"], expires: ["Expires", "到期"], revoke: ["Revoke", "撤销"],
  never: ["never", "永不"],
  s_conversation: ["conversation", "对话"], s_livestream: ["livestream", "直播"], s_recording: ["recording", "录制"],
  session_events: ["Session events", "会话事件"], audit: ["Server log", "服务器日志"],
  audit_note: ["Each line holds the hash of the one before: it cannot be altered unseen.", "每行包含上一行的哈希，篡改即可发现。"],
  upload_title: ["Add a face", "添加形象"], portrait: ["Portrait (JPEG, PNG, WebP)", "肖像（JPEG、PNG、WebP）"], whose: ["Whose face is it?", "这是谁的脸？"],
  synthetic: ["Nobody's: it was drawn or generated", "虚构：绘制或生成的面孔"], person: ["A real person, who agreed", "真人，且已同意"],
  method: ["How do you know?", "如何确认？"], m_self: ["It is my own face", "是我本人"], m_document: ["A signed paper is kept", "存有签字文件"],
  m_liveness: ["Checked in front of a camera", "经摄像头验证"],
  agreed_to: ["Agreed to", "同意用于"], until: ["Until (empty: for ever)", "有效期至（留空为永久）"], save: ["Save", "保存"], cancel: ["Cancel", "取消"],
  person_needed: ["Say whose face it is.", "请填写姓名。"], erase: ["Erase", "删除"],
  too_slow: ["The server asks for a little patience.", "请求过于频繁，请稍候。"],
};

let column = (localStorage.getItem("liveavatar.language") || navigator.language).startsWith("zh") ? 1 : 0;

export const language = () => ["en", "zh"][column];

// A state, as the server says it, in words where there are some.
export const known = state => (state in WORDS ? t(state) : state);

// The text of a key; {name} is filled from values.
export const t = (key, values = {}) => WORDS[key][column].replace(/\{(\w+)\}/g, (_, name) => values[name]);

export function translate(root = document) {
  document.documentElement.lang = language() === "zh" ? "zh-CN" : "en";
  for (const e of root.querySelectorAll("[data-t]")) e.textContent = t(e.dataset.t);
  for (const e of root.querySelectorAll("[data-t-placeholder]")) e.placeholder = t(e.dataset.tPlaceholder);
  for (const e of root.querySelectorAll("[data-t-label]")) { e.setAttribute("aria-label", t(e.dataset.tLabel)); if (e.tagName === "BUTTON") e.title = t(e.dataset.tLabel); }
}

export function switchLanguage() {
  column = 1 - column;
  localStorage.setItem("liveavatar.language", language());
  translate();
}

export const ms = seconds => seconds === null || seconds === undefined || !Number.isFinite(seconds) ? "–" : `${Math.round(seconds * 1000)} ms`;

export const bytes = count => count === null || count === undefined ? "–" : count > 1e9 ? `${(count / 1e9).toFixed(2)} GB` : count > 1e6 ? `${(count / 1e6).toFixed(1)} MB` : `${Math.round(count / 1e3)} kB`;

export function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  const [large, small, units] = s < 3600 ? [Math.floor(s / 60), s % 60, ["min", "s"]] : [Math.floor(s / 3600), Math.floor(s % 3600 / 60), ["h", "min"]];
  return [large && `${large} ${units[0]}`, (small || !large) && `${small} ${units[1]}`].filter(Boolean).join(" ");
}

export const clock = unix => new Date(unix * 1000).toLocaleTimeString(language(), {hour12: false});

export const day = unix => new Date(unix * 1000).toLocaleDateString(language());
