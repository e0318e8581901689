"""One YAML file is one complete recipe: its stages, in order, each resumable (training.md section 1)."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from liveavatar import config as settings
from liveavatar.conditioning.visemes import ARTICULATORS
from liveavatar.core import ConfigError, latents_of
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.probe import load_probe
from liveavatar.training import (
    ablations, choose, codec, consistency, data, dmd, export, forcing, hearing, ingest, judging, lids, lips, ode, planning, preview, probing, progress,
    shards, students, teacher, textcode, unpack,
)  # fmt: skip
from liveavatar.training.checkpoints import checkpoint_path
from liveavatar.training.groups import device_of, grouped, join, launched, meet, rank_and_world
from liveavatar.training.memory import ClipConfig
from liveavatar.training.stored import StoredConditions, hears_visemes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """run: folder for checkpoints and logs. processes: ranks that train together, each on a batch of its own. Over a frozen
    base (forcing.base) there is no vae section, and no data section where RUN/latents holds encoded clips already."""

    run: str
    forcing: forcing.ForcingConfig
    export: export.ExportConfig
    videos: ingest.VideosConfig | None = None  # clips come from these instead of the generator
    data: data.DataConfig | None = None
    vae: codec.CodecConfig | None = None
    clip: ClipConfig | None = None  # size of encoded clips that no data section describes, for the plan of memory
    text: textcode.TextConfig | None = None  # without it the text encoder stays random
    visemes: hearing.VisemesConfig | None = None  # without it the avatar hears the spectrum
    teacher: teacher.TeacherConfig | None = None
    probe: probing.ProbeConfig | None = None
    ode: ode.OdeConfig | None = None
    consistency: consistency.ConsistencyConfig | None = None
    dmd: dmd.DmdConfig | None = None
    choose: choose.ChooseConfig | None = None
    lids: lids.LidsConfig | None = None
    lips: lips.LipsConfig | None = None
    ablations: ablations.AblationConfig = ablations.AblationConfig()
    preview: str | None = None  # stage that `preview` looks at; None: the one that is exported
    seed: int = 0
    processes: int = 1

    def __post_init__(self):
        if self.processes < 1:
            raise ConfigError(f"processes={self.processes}: must be at least 1")
        self._check_sections()
        if self.data:
            self._check_lengths()
        for name in ("in_dim", "out_dim") if self.vae else ():
            if self.forcing.model.get(name, 16) != self.vae.z_dim:
                raise ConfigError(f"forcing.model.{name}={self.forcing.model.get(name, 16)}: must equal vae.z_dim={self.vae.z_dim}")
        self._check_strategies()
        self._check_distillation()

    def _check_strategies(self) -> None:
        stages = ("vae", "teacher", "forcing", "ode", "consistency", "dmd", "lids", "lips")
        loops = {f"{name}.loop": section.loop for name in stages if (section := getattr(self, name))}
        if self.vae and self.vae.decoder:
            loops["vae.decoder"] = self.vae.decoder
        for key, loop in loops.items():
            if loop.strategy == "single":
                continue
            problem = f"{key}.strategy={loop.strategy!r}"
            if key.startswith("vae"):
                raise ConfigError(f"{problem}: the codec is trained with single")
            if loop.strategy == "deepspeed" and not self.forcing.base:
                raise ConfigError(f"{problem}: only for adapters (forcing.base): ZeRO-2 also decays weights that nothing uses, other "
                                  "than one process would; whole models are trained with single or fsdp2")

    def _check_sections(self) -> None:
        lacking = [name for name in ("data", "vae") if not self.forcing.base and getattr(self, name) is None]
        if lacking:
            raise ConfigError(f"missing section {lacking[0]!r}")
        own = ("vae", "text", "visemes", "teacher", "probe", "choose", "lids", "lips")
        surplus = [name for name in own if self.forcing.base and getattr(self, name)]
        if surplus:
            raise ConfigError(f"section {surplus[0]!r}: not over a base; {self.forcing.base.folder} is used as it is; dmd.judge says what Stage 2 is worth")
        if self.forcing.base and self.export.blend:
            raise ConfigError("export.blend: not over a base, whose adapters are exported as they are; leave it out")
        if not self.forcing.base and hears_visemes(self.forcing.model) != (self.visemes is not None):
            raise ConfigError(f"forcing.model.audio_dim={self.forcing.model.get('audio_dim')}: {len(ARTICULATORS)} where the recipe has a visemes "
                              "section, else what the spectrum has")

    def _check_lengths(self) -> None:
        clip_latents = latents_of(self.data.pictures) - self.forcing.context_latents
        if clip_latents < 1 or clip_latents % self.forcing.block_latents:
            raise ConfigError(f"data.pictures={self.data.pictures}: {clip_latents} latents after the context are no whole number of blocks")
        sides, size = self.data.sides, self.data.size
        if sides != (size, size) and not (self.videos and self.forcing.base):
            raise ConfigError(f"data.height={sides[0]}, width={sides[1]}: for clips of videos over a base only; the rest is square: say data.size")
        if self.clip and self.clip != (made := planning.clip_of_data(self)):
            raise ConfigError(f"clip says {self.clip.latents} latents of {self.clip.height}x{self.clip.width} pixels (height x width), data makes "
                              f"{made.latents} of {made.height}x{made.width}: let them agree, or leave clip out")

    @property
    def default_identity(self) -> int:
        """The avatar that ships; -1, which nobody is, without rendered data."""
        return self.data.default_identity if self.data else -1

    def texts(self) -> TextEncoder | StoredConditions:
        """What turns captions into rows."""
        if self.forcing.base:
            return StoredConditions(self.run)
        return textcode.text_encoder_of(self.forcing.model, self.seed, self.text, self.run)

    def _check_distillation(self) -> None:
        for key in ("start", "teacher"):
            from_base = self.forcing.base and getattr(self.dmd, key, None) == "teacher"
            if self.dmd and not from_base and not getattr(self, getattr(self.dmd, key)):
                raise ConfigError(f"dmd.{key}={getattr(self.dmd, key)!r}: the recipe has no {getattr(self.dmd, key)} section")
        if self.forcing.start == "teacher" and not self.teacher:
            raise ConfigError("forcing.start='teacher': the recipe has no teacher section")
        if self.forcing.wording_share and (self.videos or self.forcing.base):
            raise ConfigError(f"forcing.wording_share={self.forcing.wording_share}: only rendered people can be said in other words")
        if self.ablations.students and not self.dmd:
            raise ConfigError("ablations.students: the recipe has no dmd section to train them by")
        if self.choose and not self.dmd:
            raise ConfigError("choose: the recipe has no dmd section to choose from")
        if self.lids and self.lids.start == "chosen" and not self.choose:
            raise ConfigError("lids.start='chosen': the recipe has no choose section")
        if self.lips and self.lips.start == "lids" and not self.lids:
            raise ConfigError("lips.start='lids': the recipe has no lids section; lips.start=avatar goes on from an unpacked one")
        judged = self.dmd and self.dmd.judge
        if judged and not self.forcing.base:
            raise ConfigError("dmd.judge: judges adapters over a base; here a choose section does that, by the probe")
        if self.export.stage == "best" and not judged:
            raise ConfigError("export.stage='best': nobody says which that is; give dmd.judge: {command: ...}")
        needed = {"chosen": "choose", "best": "dmd"}.get(self.export.stage, self.export.stage)
        if not getattr(self, needed):
            raise ConfigError(f"export.stage={self.export.stage!r}: the recipe has no {needed} section")
        if self.dmd and self.export.stage in ("dmd", "chosen", "best") and self.dmd.history != "per_step":
            # The chain keeps one bank per step; a student used to other history drifts in it (training.md 2.4).
            raise ConfigError(f"dmd.history={self.dmd.history!r}: students of this history cannot be exported, the runtime has per_step only")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file. Raises ConfigError."""
    return settings.load(path, overrides, cls=Recipe)


def recipe_sha256(recipe: Recipe) -> str:
    """SHA-256 of all that the recipe says, defaults written out."""
    return hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()


def run_data(recipe: Recipe, sync_judge: ingest.SyncJudge | None = None) -> None:
    """Render what is missing of the corpus, or make it of the videos where the recipe names some."""
    if recipe.videos is not None:
        ingest.ingest(recipe.videos, recipe.data, sync_judge)
        return
    data.render_corpus(recipe.data, recipe.seed)
    data.render_portraits(recipe.data, recipe.seed)


def run_vae(recipe: Recipe) -> None:
    """Train the codec and write RUN/vae with the statistics of its latents."""
    codec.train_codec(recipe.vae, recipe.data.folder, recipe.run, recipe.seed)
    if first_rank():
        codec.finish_codec(recipe.vae, recipe.data.folder, recipe.run, recipe.seed)


def run_decoder(recipe: Recipe) -> None:
    """Train the decoder alone and write RUN/vae again; latents stay valid."""
    codec.train_decoder(recipe.vae, recipe.data.folder, recipe.run, recipe.seed)
    if first_rank():
        codec.finish_codec(recipe.vae, recipe.data.folder, recipe.run, recipe.seed, measured=False)


def run_probe(recipe: Recipe) -> None:
    """Train the judge network and write RUN/probe, with what it is worth on the held-out clips."""
    probing.train_probe(recipe.probe, recipe.data.folder, recipe.run, recipe.seed)
    if first_rank():
        probing.render_strangers(recipe.probe, recipe.data, recipe.run, recipe.seed)
        probing.finish_probe(recipe.probe, recipe.data.folder, recipe.run, recipe.seed, recipe_sha256(recipe))


def run_text(recipe: Recipe) -> None:
    """Train the text encoder on captions."""
    textcode.train_text(recipe.text, recipe.forcing.model["text_dim"], recipe.run, recipe.seed)


def run_visemes(recipe: Recipe) -> None:
    """Make what is missing of the spoken corpus, train the speech encoder on it and write RUN/visemes, with how well it follows strangers."""
    hearing.speak(recipe.visemes, recipe.seed)
    hearing.train_visemes(recipe.visemes, recipe.run, recipe.seed)


def run_latents(recipe: Recipe) -> None:
    """Encode what is not encoded yet; ranks share the clips."""
    forcing.encode_corpus(recipe.forcing, recipe.data.folder, recipe.run, *rank_and_world())
    meet()


def run_pack(recipe: Recipe) -> None:
    """The encoded clips as tar shards beside their files, for a machine that gets RUN/latents/train-*.tar alone."""
    shards.pack(Path(recipe.run) / "latents", "train")


def run_teacher(recipe: Recipe) -> None:
    """Train the bidirectional transformer."""
    teacher.train_teacher(recipe.teacher, recipe.forcing, recipe.run, recipe.seed, recipe.texts(), recipe.default_identity)


def run_teacher_clips(recipe: Recipe) -> None:
    """The held-out clips as the teacher makes them, for the gates that compare with it."""
    preview.teacher_clips(recipe.forcing, recipe.teacher, recipe.data.folder, recipe.run, recipe.seed, recipe.texts())


def run_forcing(recipe: Recipe) -> None:
    """Train the transformer."""
    forcing.train_forcing(recipe.forcing, recipe.run, recipe.seed, recipe.texts(), recipe.default_identity)


def run_ode(recipe: Recipe) -> None:
    """Few-step initialisation from the transformer's own trajectories."""
    ode.train_ode(recipe.ode, recipe.forcing, recipe.export.sigmas, recipe.run, recipe.seed, recipe.texts(), recipe.default_identity)


def run_consistency(recipe: Recipe) -> None:
    """Few-step initialisation from neighbouring levels of real clips."""
    consistency.train_consistency(recipe.consistency, recipe.forcing, recipe.export.sigmas, recipe.run, recipe.seed, recipe.texts(),
                                  recipe.default_identity)


def run_dmd(recipe: Recipe) -> None:
    """Distribution matching on own rollouts, at the levels that are exported. With a `choose` section the teacher must be the better one."""
    if recipe.choose and recipe.dmd.teacher == "teacher" and first_rank() and not checkpoint_path(recipe.run, "dmd").exists():
        choose.check_teacher(recipe.choose, recipe.teacher, recipe.forcing, recipe.data, recipe.run, recipe.seed, recipe.texts(), recipe.dmd.start,
                             recipe.export.sigmas)
    meet()
    judge = judging.Judge(recipe.dmd.judge, recipe.export, recipe.forcing.base, recipe.run) if recipe.dmd.judge else None
    dmd.train_dmd(recipe.dmd, recipe.forcing, recipe.export.sigmas, recipe.run, recipe.seed, recipe.texts(), recipe.default_identity, judge=judge)


def run_choose(recipe: Recipe) -> None:
    """Judge what Stage 2 began with, kept and ended with; the best becomes RUN/chosen.pt."""
    choose.choose(recipe.choose, recipe.forcing, recipe.data, recipe.run, recipe.seed, recipe.texts(), "dmd", recipe.dmd.start, recipe.export.sigmas)


def run_lids(recipe: Recipe) -> None:
    """Teach the finished transformer to blink when it is told to."""
    lids.train_lids(recipe.lids, recipe.forcing, recipe.export.sigmas, recipe.run, recipe.seed, recipe.texts(), recipe.default_identity)


def run_painter(recipe: Recipe) -> None:
    """Train what paints mouths into latents."""
    lips.train_painter(recipe.lips, recipe.forcing, recipe.run, recipe.seed, recipe.texts(), recipe.default_identity)


def run_lips(recipe: Recipe) -> None:
    """Teach the finished transformer's mouth to follow what is said."""
    lips.train_lips(recipe.lips, recipe.forcing, recipe.export.sigmas, recipe.run, recipe.seed, recipe.texts(), recipe.default_identity)


def run_unpack(recipe: Recipe) -> None:
    """The avatar that the recipe exports, taken apart to train on: its codec, its text encoder, and its transformer as stage `avatar`."""
    unpack.unpack(recipe.export.folder, recipe.forcing, recipe.text, recipe.run, recipe.seed, recipe.data.folder)


def run_export(recipe: Recipe) -> None:
    """Put the averages of the last checkpoints together as a checkpoint folder; training may go on meanwhile."""
    if first_rank() and recipe.forcing.base:
        export.export_adapter(recipe.export, recipe.forcing, recipe.run, recipe.seed)
    elif first_rank():
        export.export_folder(recipe.export, recipe.forcing, recipe.data, recipe.run, recipe.seed, recipe.texts(), recipe.videos is None,
                             tuple(recipe.visemes.voices) if recipe.visemes else (),
                             bool(recipe.lips and recipe.lips.head_share and recipe.videos is None))
    progress.LOG.info("wrote %s", recipe.export.folder)


def run_preview(recipe: Recipe) -> None:
    """Pictures of the last checkpoint beside the truth, and how well its mouth follows, into RUN/preview."""
    if first_rank():
        probe = load_probe((recipe.choose and recipe.choose.probe) or Path(recipe.run) / "probe")[0] if recipe.probe else None
        preview.preview(recipe.forcing, recipe.data, recipe.run, recipe.seed, recipe.export.sigmas, recipe.texts(),
                        recipe.preview or recipe.export.stage, teach=recipe.teacher, probe=probe)


def run_ablations(recipe: Recipe) -> None:
    """What each part of the method is worth on the checkpoints of the run, into RUN/ablations."""
    if recipe.ablations.students:
        students.train_students(recipe.ablations.students, recipe.dmd, recipe.forcing, recipe.export.sigmas, Path(recipe.run), recipe.seed,
                                recipe.texts(), recipe.default_identity)
    ablations.ablate(recipe.ablations, recipe.forcing, recipe.data, recipe.run, recipe.seed, recipe.texts(), recipe.export.stage,
                     recipe.export.sigmas)
    progress.LOG.info("wrote %s", Path(recipe.run) / "ablations" / "table.md")


STAGES = {"data": run_data, "vae": run_vae, "decoder": run_decoder, "probe": run_probe, "text": run_text, "visemes": run_visemes,
          "latents": run_latents, "teacher": run_teacher, "forcing": run_forcing, "ode": run_ode, "consistency": run_consistency, "dmd": run_dmd,
          "choose": run_choose, "lids": run_lids, "painter": run_painter, "lips": run_lips, "export": run_export}
# The sections that ask for them.
OPTIONAL = {"data": "data", "vae": "vae", "decoder": "vae.decoder", "probe": "probe", "text": "text", "visemes": "visemes", "latents": "data",
            "teacher": "teacher", "teacher_clips": "teacher", "ode": "ode", "consistency": "consistency", "dmd": "dmd", "choose": "choose", "lids": "lids",
            "painter": "lips", "lips": "lips", "unpack": "vae",
            "preview": "vae", "ablations": "vae"}  # both look at rendered heads through the codec that the recipe trained
SIDE_STAGES = {"unpack": run_unpack, "pack": run_pack, "teacher_clips": run_teacher_clips, "preview": run_preview, "ablations": run_ablations}  # only by name
ALONE = ("data", "visemes", "unpack", "pack", "teacher_clips", "choose", "export", "preview", "ablations")  # these run in one process


def first_rank() -> bool:
    """True on the rank that writes."""
    return rank_and_world()[0] == 0


def run(stage: str, config_path: str | Path, overrides: Sequence[str] = (), sync_judge: ingest.SyncJudge | None = None,
        told: bool = False) -> None:
    """Run one stage of a recipe, or "all" of them in order. Raises ConfigError, WeightsError, InputError.

    sync_judge: of videos that are to become clips; training knows no measure of its own. told: how far it is goes to stderr, from the
    first rank.
    """
    settings.one_of("stage", stage, (*STAGES, *SIDE_STAGES, "all"))
    recipe = read_recipe(config_path, overrides)
    names = stages_of(recipe) if stage == "all" else [stage]
    for name in names:
        if not _asked_for(recipe, name):
            raise ConfigError(f"{config_path}: stage {name}: {_why_not(recipe, name)}")
    joined = launched() and not grouped()  # Ray Train has joined already
    if joined:
        join()
    told = told and first_rank()
    if told:
        progress.show()
    try:
        for number, name in enumerate(names, 1):
            began = time.monotonic()
            progress.LOG.info("%s (%d of %d), in %s", name, number, len(names), recipe.run)
            _run_stage(name, recipe, {"sync_judge": sync_judge} if name == "data" else {}, told)
            progress.LOG.info("%s done, %.0f s", name, time.monotonic() - began)
    finally:
        if joined:
            dist.destroy_process_group()


def stages_of(recipe: Recipe) -> list[str]:
    """The stages of "all": those the recipe has a section for, in order."""
    return [name for name in STAGES if _asked_for(recipe, name)]


def _asked_for(recipe: Recipe, name: str) -> bool:
    value = recipe
    for part in OPTIONAL[name].split(".") if name in OPTIONAL else ():
        value = value and getattr(value, part)
    return value is not None


def _why_not(recipe: Recipe, name: str) -> str:
    base, lacking = recipe.forcing.base, f"the recipe has no {OPTIONAL[name]} section"
    if base and name in ("vae", "decoder", "visemes", "teacher", "probe", "choose", "lids", "painter", "lips"):
        return f"that part of {base.folder} is used as it is; a recipe over a base trains adapters only"
    if base and name in SIDE_STAGES:
        return (f"{lacking}, and over a base it can have none: export the adapter, name {recipe.export.folder}/liveavatar.safetensors as "
                f"model.lora beside {base.folder}, and judge what `liveavatar generate` makes with `liveavatar evaluate`")
    return lacking


def _run_stage(name: str, recipe: Recipe, asked: dict, told: bool) -> None:
    """asked: further arguments of a stage that runs alone."""
    if recipe.processes == 1 or name in ALONE or grouped():
        if name not in ALONE or first_rank():
            _work(name, recipe, **asked)
        return meet()
    with tempfile.TemporaryDirectory(prefix="train") as folder:
        mp.spawn(_rank_main, args=(name, recipe, f"file://{folder}/group", told), nprocs=recipe.processes)


def _rank_main(rank: int, name: str, recipe: Recipe, meeting: str, told: bool) -> None:
    if told and rank == 0:
        progress.show()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    join(rank, recipe.processes, meeting)
    try:
        _work(name, recipe)
    finally:
        dist.destroy_process_group()


def _work(name: str, recipe: Recipe, **asked) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(threads, recipe.forcing.loop.threads)))
    try:
        if name in planning.PLANNED:
            planning.refuse_other_clips(recipe)
            planning.refuse_what_cannot_fit(recipe, name, device_of(getattr(recipe, name).loop.device))
        (STAGES | SIDE_STAGES)[name](recipe, **asked)
    finally:
        torch.set_num_threads(threads)
