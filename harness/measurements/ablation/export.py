"""Save an ablated model, as an ordinary Hugging Face checkpoint or as a smaller one with low-rank factors."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import __version__
from harness.engine.manifest import MANIFEST, read_manifest
from harness.errors import InputError, SettingError
from harness.evaluation.calibration import CalibrationText
from harness.evaluation.requests import TaskContext
from harness.files import new_folder
from harness.measurements.ablation.cells import cell_id, numeric_settings
from harness.measurements.ablation.region_settings import NO_REGION
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.sources import sources_of
from harness.measurements.ablation.units import frozen_cells, frozen_digests
from harness.models.biases import require_biases, write_biases
from harness.models.description import ModelDescription
from harness.models.editing import Ablation, RealisedAblation, ablated, biases_of, resolved_regions
from harness.models.factored import factors_are_smaller, write_factored
from harness.models.families import matrices_of, skeleton
from harness.models.loading import LoadedModel, describe_model, load, load_tokenizer, require_head
from harness.models.reference import Reference, describe_reference
from harness.models.treatment import Sources, spectrum_of
from harness.settings.validation import validated
from harness.spectral.ablation import low_rank_factors, others
from harness.tables.labels import region_words
from harness.tasks.registry import wants_classifier

ABOUT = "ablation.json"


@dataclass(frozen=True)
class Exported:
    """An exported model. n_factored: how many of its matrices were saved as low-rank factors."""

    folder: Path
    ablation: Ablation
    realised: RealisedAblation
    n_factored: int

    def __str__(self) -> str:
        size = sum(path.stat().st_size for path in self.folder.iterdir())
        factors = f", {self.n_factored} as low-rank factors" if self.n_factored else ""
        return (
            f"{self.ablation.target.label}: {region_words(self.ablation.label)} ({self.realised.n_removed} of"
            f" {self.realised.n_values} singular values, {len(self.ablation.target.matrices)} matrices{factors})"
            f" in {self.folder}, {size / 1e6:.1f} MB"
        )


def export(settings: StudySettings, factored: bool = False) -> Exported:
    """Save the model with the one ablation that the settings mean into the folder settings.output.

    factored: whether matrices are saved as low-rank factors where that takes less room.
    Raises InputError if the settings mean several ablations, or the folder is not empty.
    """
    description = describe_model(settings.model)
    text = _calibration(settings, description)
    reference = _reference(settings, description)
    ablation = the_ablation(settings, description, text, reference)
    model = _Source(settings, description, text, reference)
    return _export(model, ablation, _free_folder(settings.output), factored)


def export_cell(study: str | Path, cell: str, output: str | None, factored: bool = False) -> Exported:
    """Save the model with the ablation of one cell of a study into the folder `output`.

    study: the folder of the study. cell: the id of the cell, or the beginning of it. factored: as in `export`.
    Raises InputError if there is no such cell, the model is no longer the one that the study measured, or the folder is
    not empty.
    """
    folder = _free_folder(output)
    manifest = read_manifest(study)
    if manifest.kind != "ablation":
        raise InputError(f"--study: {study} holds {manifest.kind} and no cells; give the folder of a study")
    cells, digests = frozen_cells(Path(study), manifest.content), frozen_digests(Path(study), manifest.content)
    manifest.enter()
    found = [one for one in cells if one.id.startswith(cell)]
    if len(found) != 1 or not cell:
        what = f"{len(found)} cells whose ids begin so" if found and cell else "no such cell"
        raise InputError(f"--cell: {cell!r}: {study} has {what}; take a cell_id from its metrics table")
    (chosen,) = found
    if not chosen.ablation.target.matrices or chosen.ablation.region == NO_REGION:
        raise InputError(f"--cell: {cell!r} is the {chosen.ablation.target.label}: it removes nothing; choose another")
    try:
        settings = validated(StudySettings, manifest.settings)
    except SettingError as error:
        raise InputError(f"{Path(study) / MANIFEST}: {error.below('settings')}") from error
    description = describe_model(settings.model, wants_classifier(settings.tasks))
    if cell_id(numeric_settings(settings, description), chosen.ablation, digests[chosen.task]) != chosen.id:
        raise InputError(
            f"model.name: {settings.model.name!r} (or this harness) is no longer what {study} was frozen for;"
            " restore it"
        )
    reference = _reference(settings, description)
    if chosen.ablation.treatment.reference != (None if reference is None else reference.digest):
        raise InputError(f"reference.name: it is no longer what {study} was frozen for; restore it")
    model = _Source(settings, description, _calibration(settings, description), reference)
    return _export(model, chosen.ablation, folder, factored)


def the_ablation(
    settings: StudySettings, description: ModelDescription, text: CalibrationText | None = None,
    reference: Reference | None = None,
) -> Ablation:
    """Return the one ablation that the settings mean, apart from controls. Raises InputError if there are several.

    text: the calibration text of the settings, prepared for the model. reference: the reference model if the region is
    a part of a change.
    """
    bare = skeleton(description.config, description.family)
    matrices = matrices_of(bare, description.family)
    targets = settings.region.targets(settings.target, matrices)
    touched = {name for target in targets for name in target.matrices}
    shapes = [matrix.shape for matrix in matrices if matrix.name in touched]
    regions = [region for region in settings.region.regions(shapes) if region.by != "control"]
    treatment = settings.region.treatment.treatment(text, reference)
    ablations = [Ablation(target, region, treatment) for target in targets for region in regions]
    if len(ablations) != 1:
        labels = [f"{one.target.label}: {region_words(one.label)}" for one in ablations]
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


@dataclass(frozen=True)
class _Source:
    """The model that is exported: its settings and description, the calibration text and the reference, or None."""

    settings: StudySettings
    description: ModelDescription
    text: CalibrationText | None
    reference: Reference | None


def _calibration(settings: StudySettings, description: ModelDescription) -> CalibrationText | None:
    """Return the calibration text of the settings, prepared for the model; None if there is none."""
    if settings.region.treatment.calibration is None:
        return None
    tokenizer = load_tokenizer(settings.model, description)
    context = TaskContext.of(description, tokenizer)
    return settings.region.treatment.prepared(context)


def _reference(settings: StudySettings, description: ModelDescription) -> Reference | None:
    if settings.region.treatment.of == "weight":
        return None
    return describe_reference(settings.reference, settings.model, description)


def _export(model: _Source, ablation: Ablation, folder: Path, factored: bool) -> Exported:
    settings, description = model.settings, model.description
    runtime = settings.runtime
    if runtime.edit == "branch" and description.dtype != "float32":
        raise InputError(
            f"runtime.edit: branch removes in float32 what {description.dtype} weights cannot leave out;"
            " export with runtime.edit=weight or model.dtype=float32"
        )
    loaded = load(settings.model, description)
    require_head(loaded)
    _make_savable(loaded.model)
    sources = sources_of(loaded, runtime, model.text, reference=model.reference)
    factors = _kept_factors(loaded, ablation, sources) if factored else {}
    biases = biases_of(loaded, ablation, sources) if ablation.treatment.replace == "mean" else []
    require_biases(loaded.model, biases)
    try:
        with new_folder(folder) as work:
            with ablated(loaded, ablation, sources) as realised:
                write_biases(loaded.model, biases)
                if factored:
                    write_factored(work, loaded.model, description.family.kind, factors)
                else:
                    loaded.model.save_pretrained(work)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(work)
            about = _about(model, ablation, realised)
            (work / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
            mode = (work / ABOUT).stat().st_mode
            for path in filter(Path.is_file, work.rglob("*")):
                path.chmod(mode)  # safetensors makes files that only their owner can read, against the umask
    except OSError as error:
        raise InputError(f"output: cannot write {folder} ({error})") from error
    return Exported(folder, ablation, realised, len(factors))


def _kept_factors(loaded: LoadedModel, ablation: Ablation, sources: Sources) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the low-rank factors of the kept part of each matrix of the target that is smaller in this form.

    The factors are float32 [out, n] and [n, in] for n kept values. Raises InputError if no matrix is smaller, or if the
    values are scaled and not removed.
    """
    if ablation.treatment.of != "weight":
        raise InputError(f"--factored: region.of={ablation.treatment.of} leaves a matrix at its full rank; export"
                         " without --factored")
    if ablation.treatment.scale != 0:
        raise InputError("--factored: region.scale leaves a matrix at its full rank; export without --factored")
    edited = [matrix for matrix in loaded.matrices if matrix.name in ablation.target.matrices]
    sources.prepare(edited)
    own = resolved_regions(ablation, edited, sources)
    factors = {}
    rank = kept_most = 0
    for matrix in edited:
        decomposition = spectrum_of(matrix, ablation.region, ablation.treatment, sources)
        indices = others(ablation.positions(decomposition, own.get(matrix.name)), min(matrix.shape))
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
    # The weights of a GGUF model were dequantised when it was loaded, but its config still says that it is quantised.
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if name in vars(owner):
            delattr(owner, name)
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        # The config of Llama 2 has settings of sampling but not this flag, and transformers refuses to save it so.
        generation.do_sample = True


def _about(model: _Source, ablation: Ablation, realised: RealisedAblation) -> dict[str, Any]:
    settings, description = model.settings, model.description
    return {
        "harness_version": __version__,
        "model": settings.model.label,
        "revision": settings.model.revision,
        "gguf_file": settings.model.gguf_file,
        "identity": description.identity,
        "dtype": description.dtype,
        "target": ablation.target.label,
        "matrices": list(ablation.target.matrices),
        "region": ablation.label,
        "reference": None if model.reference is None else model.reference.settings.label,
        "calibration": None if model.text is None else {**model.text.protocol, "centred": model.text.centred},
        **dataclasses.asdict(realised),
    }
