"""Saving an ablated model: an ordinary Hugging Face checkpoint, or a smaller one with low-rank factors."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import __version__
from harness.config import Config
from harness.errors import InputError
from harness.execution.ablating import RealisedAblation, ablated
from harness.execution.decompositions import DecompositionCache, disk_cache
from harness.execution.manifest import read_manifest, study_of
from harness.execution.study import NO_REGION, Ablation, cell_id, expand_regions, expand_targets, numeric_settings
from harness.execution.tasks import wants_classifier
from harness.models.factored import factors_are_smaller, write_factored
from harness.models.families import matrices_of, skeleton
from harness.models.loading import LoadedModel, ModelDescription, describe, load, require_head
from harness.spectral.ablation import low_rank_factors
from harness.spectral.regions import select

ABOUT = "ablation.json"


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, the ablation in it, and how many matrices are there as factors."""

    folder: Path
    ablation: Ablation
    realised: RealisedAblation
    n_factored: int

    def __str__(self) -> str:
        size = sum(path.stat().st_size for path in self.folder.iterdir())
        factors = f", {self.n_factored} as low-rank factors" if self.n_factored else ""
        return (
            f"{self.ablation.target.label}: {self.ablation.region.label} ({self.realised.n_removed} of"
            f" {self.realised.n_values} singular values, {len(self.ablation.target.matrices)} matrices{factors})"
            f" in {self.folder}, {size / 1e6:.1f} MB"
        )


def export(config: Config, factored: bool = False) -> Exported:
    """Save the model with the one ablation that the settings mean, into config.output.

    Raises InputError where they mean several, and where the folder is not empty.
    """
    description = describe(config.model)
    ablation = the_ablation(config, description)
    return _export(config, description, ablation, _free_folder(config.output), factored)


def export_cell(study: str | Path, cell: str, output: str | None, factored: bool = False) -> Exported:
    """Save the model with the ablation of one cell of a study; `cell` may be the beginning of its id.

    Raises InputError where there is no such cell, and where the model is no longer the one that was measured.
    """
    folder = _free_folder(output)
    manifest = read_manifest(Path(study))
    if Path(manifest["working_directory"]).is_dir():
        os.chdir(manifest["working_directory"])  # so that relative paths mean what they meant
    frozen = study_of(manifest)
    found = [one for one in frozen.cells if one.cell_id.startswith(cell)]
    if len(found) != 1 or not cell:
        what = f"{len(found)} cells whose ids begin so" if found and cell else "no such cell"
        raise InputError(f"--cell: {cell!r}: {study} has {what}; take a cell_id from its metrics table")
    (chosen,) = found
    if not chosen.ablation.target.matrices or chosen.ablation.region == NO_REGION:
        raise InputError(f"--cell: {cell!r} is the {chosen.ablation.target.label}: it removes nothing; choose another")
    config = frozen.config
    description = describe(config.model, wants_classifier(config.tasks))
    digest = frozen.tasks[chosen.task]["digest"]
    if cell_id(numeric_settings(config, description), chosen.ablation, digest) != chosen.cell_id:
        raise InputError(
            f"model.name: {config.model.name!r} (or this harness) is no longer what {study} was frozen for; restore it"
        )
    return _export(config, description, chosen.ablation, folder, factored)


def the_ablation(config: Config, description: ModelDescription) -> Ablation:
    """The one ablation that the settings mean, controls left out. Raises InputError where there are several."""
    targets = expand_targets(config.target, matrices_of(skeleton(description.config, description.family)))
    regions = [region for region in expand_regions(config.region) if region.by != "control"]
    ablations = [Ablation(target, region) for target in targets for region in regions]
    if len(ablations) != 1:
        labels = [f"{one.target.label}: {one.region.label}" for one in ablations]
        listed = ", ".join(labels[:6]) + (f", ... {labels[-1]}" if len(labels) > 6 else "")
        raise InputError(
            f"export: one ablation can be saved, and these settings mean {len(labels)} ({listed});"
            " narrow target.* and region.*, or give --study FOLDER --cell ID"
        )
    return ablations[0]


def _free_folder(output: str | None) -> Path:
    if output is None:
        raise InputError("output: not set; name the folder to write, for example output=ablated")
    folder = Path(output).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output: {folder} is there and not an empty folder; name another")
    return folder


def _export(
    config: Config, description: ModelDescription, ablation: Ablation, folder: Path, factored: bool
) -> Exported:
    if config.runtime.edit == "branch" and description.dtype != "float32":
        raise InputError(
            f"runtime.edit: branch removes in float32 what {description.dtype} weights cannot leave out;"
            " export with runtime.edit=weight or model.dtype=float32"
        )
    loaded = load(config.model, description)
    require_head(loaded)
    _make_savable(loaded.model)
    decompose = DecompositionCache(loaded, int(config.runtime.decomposition_gib * 2**30), disk_cache(config.runtime))
    factors = _kept_factors(loaded, ablation, decompose) if factored else {}
    # Beside the final folder, so that it appears whole or not at all.
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        work.mkdir(parents=True)
        with ablated(loaded, ablation, decompose) as realised:
            if factored:
                write_factored(work, loaded.model, description.family.kind, factors)
            else:
                loaded.model.save_pretrained(work)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(work)
        (work / ABOUT).write_text(json.dumps(_about(config, description, ablation, realised), indent=1) + "\n")
        mode = (work / ABOUT).stat().st_mode
        for path in filter(Path.is_file, work.rglob("*")):
            path.chmod(mode)  # safetensors shuts out other users, whatever the umask says
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    except OSError as error:
        raise InputError(f"output: cannot write {folder} ({error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Exported(folder, ablation, realised, len(factors))


def _kept_factors(loaded: LoadedModel, ablation: Ablation, decompose) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of what is kept, of every matrix of the target that takes less room in this way."""
    factors = {}
    rank = kept_most = 0
    for matrix in loaded.matrices:
        if matrix.name not in ablation.target.matrices:
            continue
        decomposition = decompose(matrix)
        kept = torch.ones(min(matrix.shape), dtype=torch.bool)
        kept[select(ablation.region, decomposition.sigma, matrix.shape).cpu()] = False
        indices = kept.nonzero().flatten()
        weight = matrix.read(loaded.model)
        if factors_are_smaller(matrix, len(indices), weight.dtype):
            left, right = low_rank_factors(weight, decomposition, indices)
            factors[matrix.name] = (left.float().cpu(), right.float().cpu())
        elif len(indices) > kept_most:
            rank, kept_most = min(matrix.shape), len(indices)
    if not factors:
        raise InputError(
            f"--factored: no matrix would be smaller as factors: {kept_most} of {rank} singular values are kept;"
            " remove more, or export without --factored"
        )
    return factors


def _make_savable(model: torch.nn.Module) -> None:
    # A GGUF model's weights were made whole when it was loaded, and it still says that it is quantised.
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if name in vars(owner):
            delattr(owner, name)
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True  # Llama 2 came with the flags of sampling and without this one; saving refuses that


def _about(
    config: Config, description: ModelDescription, ablation: Ablation, realised: RealisedAblation
) -> dict[str, Any]:
    return {
        "harness_version": __version__,
        "model": config.model.name,
        "revision": config.model.revision,
        "gguf_file": config.model.gguf_file,
        "identity": description.identity,
        "dtype": description.dtype,
        "target": ablation.target.label,
        "matrices": list(ablation.target.matrices),
        "region": ablation.region.label,
        **dataclasses.asdict(realised),
    }
