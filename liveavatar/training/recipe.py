"""One YAML file is one complete recipe: its stages, in order, each resumable (training.md section 1)."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from liveavatar import config as settings
from liveavatar.core import ConfigError
from liveavatar.training import ablations, choose, codec, consistency, data, dmd, export, forcing, ingest, ode, preview, probing, shards, teacher
from liveavatar.training.loop import checkpoint_path, meet


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """run: folder for checkpoints and logs. processes: ranks that train together, each on a batch of its own."""

    run: str
    data: data.DataConfig
    vae: codec.CodecConfig
    forcing: forcing.ForcingConfig
    export: export.ExportConfig
    videos: ingest.VideosConfig | None = None  # clips come from these instead of the generator
    teacher: teacher.TeacherConfig | None = None
    probe: probing.ProbeConfig | None = None
    ode: ode.OdeConfig | None = None
    consistency: consistency.ConsistencyConfig | None = None
    dmd: dmd.DmdConfig | None = None
    choose: choose.ChooseConfig | None = None
    ablations: ablations.AblationConfig = ablations.AblationConfig()
    preview: str | None = None  # stage that `preview` looks at; None: the one that is exported
    seed: int = 0
    processes: int = 1

    def __post_init__(self):
        if self.processes < 1:
            raise ConfigError(f"processes={self.processes}: must be at least 1")
        clip_latents = 1 + (self.data.pictures - 1) // 4 - self.forcing.context_latents
        if clip_latents < 1 or clip_latents % self.forcing.block_latents:
            raise ConfigError(f"data.pictures={self.data.pictures}: {clip_latents} latents after the context are no whole number of blocks")
        for name in ("in_dim", "out_dim"):
            if self.forcing.model.get(name, 16) != self.vae.z_dim:
                raise ConfigError(f"forcing.model.{name}={self.forcing.model.get(name, 16)}: must equal vae.z_dim={self.vae.z_dim}")
        self._check_distillation()

    def _check_distillation(self) -> None:
        for key in ("start", "teacher"):
            if self.dmd and not getattr(self, getattr(self.dmd, key)):
                raise ConfigError(f"dmd.{key}={getattr(self.dmd, key)!r}: the recipe has no {getattr(self.dmd, key)} section")
        if self.forcing.start == "teacher" and not self.teacher:
            raise ConfigError("forcing.start='teacher': the recipe has no teacher section")
        if self.choose and not self.dmd:
            raise ConfigError("choose: the recipe has no dmd section to choose from")
        needed = "choose" if self.export.stage == "chosen" else self.export.stage
        if not getattr(self, needed):
            raise ConfigError(f"export.stage={self.export.stage!r}: the recipe has no {needed} section")
        if self.dmd and self.export.stage in ("dmd", "chosen") and self.dmd.history != "per_step":
            # The chain keeps one bank per step; a student used to other history drifts in it (training.md 2.4).
            raise ConfigError(f"dmd.history={self.dmd.history!r}: students of this history cannot be exported, the runtime has per_step only")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file. Raises ConfigError."""
    return settings.load(path, overrides, cls=Recipe)


def recipe_sha256(recipe: Recipe) -> str:
    """SHA-256 of all that the recipe says, defaults written out."""
    return hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()


def run_data(recipe: Recipe) -> None:
    """Render the corpus (what is missing of it)."""
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
        codec.finish_codec(recipe.vae, recipe.data.folder, recipe.run, recipe.seed)


def run_probe(recipe: Recipe) -> None:
    """Train the judge network and write RUN/probe, with what it is worth on the held-out clips."""
    probing.train_probe(recipe.probe, recipe.data.folder, recipe.run, recipe.seed)
    if first_rank():
        probing.render_strangers(recipe.probe, recipe.data, recipe.run, recipe.seed)
        probing.finish_probe(recipe.probe, recipe.data.folder, recipe.run, recipe.seed, recipe_sha256(recipe))


def run_latents(recipe: Recipe) -> None:
    """Encode what is not encoded yet; ranks share the clips."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    forcing.encode_corpus(recipe.forcing, recipe.data.folder, recipe.run, rank, world)
    meet()


def run_pack(recipe: Recipe) -> None:
    """The encoded clips as tar shards beside their files, for a machine that gets RUN/latents/train-*.tar alone."""
    shards.pack(Path(recipe.run) / "latents", "train")


def run_teacher(recipe: Recipe) -> None:
    """Train the bidirectional transformer."""
    text = export.text_encoder_of(recipe.forcing.model, recipe.seed)
    teacher.train_teacher(recipe.teacher, recipe.forcing, recipe.run, recipe.seed, text, recipe.data.default_identity)


def run_teacher_clips(recipe: Recipe) -> None:
    """The held-out clips as the teacher makes them, for the gates that compare with it."""
    text = export.text_encoder_of(recipe.forcing.model, recipe.seed)
    preview.teacher_clips(recipe.forcing, recipe.teacher, recipe.data.folder, recipe.run, recipe.seed, text)


def run_forcing(recipe: Recipe) -> None:
    """Train the transformer."""
    text = export.text_encoder_of(recipe.forcing.model, recipe.seed)
    forcing.train_forcing(recipe.forcing, recipe.run, recipe.seed, text, recipe.data.default_identity)


def run_ode(recipe: Recipe) -> None:
    """Few-step initialisation from the transformer's own trajectories."""
    text = export.text_encoder_of(recipe.forcing.model, recipe.seed)
    ode.train_ode(recipe.ode, recipe.forcing, recipe.export.sigmas, recipe.run, recipe.seed, text, recipe.data.default_identity)


def run_consistency(recipe: Recipe) -> None:
    """Few-step initialisation from neighbouring levels of real clips."""
    text = export.text_encoder_of(recipe.forcing.model, recipe.seed)
    consistency.train_consistency(recipe.consistency, recipe.forcing, recipe.export.sigmas, recipe.run, recipe.seed, text,
                                  recipe.data.default_identity)


def run_dmd(recipe: Recipe) -> None:
    """Distribution matching on own rollouts, at the levels that are exported. With a `choose` section the teacher must be the better one."""
    if recipe.choose and recipe.dmd.teacher == "teacher" and first_rank() and not checkpoint_path(recipe.run, "dmd").exists():
        choose.check_teacher(recipe.choose, recipe.teacher, recipe.forcing, recipe.data, recipe.run, recipe.seed, recipe.dmd.start, recipe.export.sigmas)
    meet()
    text = export.text_encoder_of(recipe.forcing.model, recipe.seed)
    dmd.train_dmd(recipe.dmd, recipe.forcing, recipe.export.sigmas, recipe.run, recipe.seed, text, recipe.data.default_identity)


def run_choose(recipe: Recipe) -> None:
    """Judge what Stage 2 began with, kept and ended with; the best becomes RUN/chosen.pt."""
    choose.choose(recipe.choose, recipe.forcing, recipe.data, recipe.run, recipe.seed, "dmd", recipe.dmd.start, recipe.export.sigmas)


def run_export(recipe: Recipe) -> None:
    """Put the averages of the last checkpoints together as a checkpoint folder; training may go on meanwhile."""
    if first_rank():
        export.export_folder(recipe.export, recipe.forcing, recipe.data, recipe.run, recipe.seed)


def run_preview(recipe: Recipe) -> None:
    """Pictures of the last checkpoint beside the truth, and how well its mouth follows, into RUN/preview."""
    if first_rank():
        preview.preview(recipe.forcing, recipe.data, recipe.run, recipe.seed, recipe.export.sigmas, recipe.preview or recipe.export.stage,
                        teach=recipe.teacher)


def run_ablations(recipe: Recipe) -> None:
    """What each part of the method is worth on the checkpoints of the run, into RUN/ablations."""
    ablations.ablate(recipe.ablations, recipe.forcing, recipe.data, recipe.run, recipe.seed, recipe.export.stage, recipe.export.sigmas)


STAGES = {"data": run_data, "vae": run_vae, "decoder": run_decoder, "probe": run_probe, "latents": run_latents, "teacher": run_teacher,
          "forcing": run_forcing, "ode": run_ode, "consistency": run_consistency, "dmd": run_dmd,
          "choose": run_choose, "export": run_export}
# The sections that ask for them.
OPTIONAL = {"decoder": "vae.decoder", "probe": "probe", "teacher": "teacher", "teacher_clips": "teacher", "ode": "ode", "consistency": "consistency", "dmd": "dmd",
            "choose": "choose"}
SIDE_STAGES = {"pack": run_pack, "teacher_clips": run_teacher_clips, "preview": run_preview, "ablations": run_ablations}  # only by name
ALONE = ("data", "pack", "teacher_clips", "choose", "export", "preview", "ablations")  # these run in one process


def first_rank() -> bool:
    """True on the rank that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def run(stage: str, config_path: str | Path, overrides: Sequence[str] = (), sync_judge: ingest.SyncJudge | None = None) -> None:
    """Run one stage of a recipe, or "all" of them in order. Raises ConfigError, WeightsError, InputError.

    sync_judge: of videos that are to become clips; training knows no measure of its own.
    """
    settings.one_of("stage", stage, (*STAGES, *SIDE_STAGES, "all"))
    recipe = read_recipe(config_path, overrides)
    for name in stages_of(recipe) if stage == "all" else (stage,):
        if not _asked_for(recipe, name):
            raise ConfigError(f"{config_path}: stage {name}: the recipe has no {OPTIONAL[name]} section")
        if name == "data" and recipe.videos is not None:
            ingest.ingest(recipe.videos, recipe.data, sync_judge)
        else:
            _run_stage(name, recipe)


def stages_of(recipe: Recipe) -> list[str]:
    """The stages of "all": those the recipe has a section for, in order."""
    return [name for name in STAGES if _asked_for(recipe, name)]


def _asked_for(recipe: Recipe, name: str) -> bool:
    return name not in OPTIONAL or operator.attrgetter(OPTIONAL[name])(recipe) is not None


def _run_stage(name: str, recipe: Recipe) -> None:
    if recipe.processes == 1 or name in ALONE or dist.is_initialized():
        return _work(name, recipe)
    with tempfile.TemporaryDirectory(prefix="train") as folder:
        mp.spawn(_rank_main, args=(name, recipe, f"file://{folder}/group"), nprocs=recipe.processes)


def _rank_main(rank: int, name: str, recipe: Recipe, meeting: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=recipe.processes)
    try:
        _work(name, recipe)
    finally:
        dist.destroy_process_group()


def _work(name: str, recipe: Recipe) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(threads, recipe.forcing.loop.threads)))
    try:
        (STAGES | SIDE_STAGES)[name](recipe)
    finally:
        torch.set_num_threads(threads)
