"""What a file's training arguments say of its model, compared with the weights' shapes and the caller's options."""

from __future__ import annotations

from dit_export.checkpoints.presets import PRESETS
from dit_export.checkpoints.source import Source
from dit_export.checkpoints.statements import ALONE, Statements
from dit_runtime.bundle.macs import MODULATIONS
from dit_runtime.bundle.manifest import ModelSpec
from dit_runtime.core.errors import CheckpointError

# What a DiT with the official names has not, though no parameter's name or shape may show it.
NO_PARTS = ("wo_shift",)
# Names of the number of classes in the training scripts of DiT's descendants.
CLASS_COUNTS = ("num_classes", "n_classes", "nb_classes", "num_labels", "nclass", "n_class", "num_class", "class_num")


def has_null_row(source: Source, said: Statements, rows: int) -> bool:
    """Whether the last of the label table's ``rows`` is the null class.

    ``--classes`` decides; then the training arguments; a file that says nothing has one, as the official code makes it.

    Raises:
        CheckpointError: the rows are neither as many as the classes nor one more.
    """
    dropout = said.number("class_dropout_prob", "cfg_prob", "label_dropout", "label_dropout_prob", "label_drop_prob")
    stated = said.number(*CLASS_COUNTS)
    if source.classes is not None:
        if rows not in (source.classes, source.classes + 1):
            raise CheckpointError(
                f"{said.source}: --classes {source.classes}, and a label table of {rows} rows; expected one row per "
                f"class, and one more for the null class if there is one: --classes {rows - 1} or --classes {rows}"
            )
        return rows == source.classes + 1
    if stated is None:
        if dropout == 0:
            return False
        if rows < 2:
            raise CheckpointError(
                f"{said.source}: a label table of {rows} row; expected a row per class and one for null, or --classes "
                f"{rows} if there is none"
            )
        return True
    expected = (stated, stated + 1) if dropout is None else (stated + (dropout > 0),)
    if rows not in expected:
        more = "" if dropout is None else f" and a label dropout of {dropout:g}"
        raise CheckpointError(
            f"{said.source}: its training arguments say {stated} classes{more}, and its label table has {rows} rows; "
            f"say --classes {rows - 1} if the last row is the null class, or --classes {rows} if there is none"
        )
    return rows == stated + 1


def heads_of(source: Source, said: Statements) -> int | None:
    """The number of attention heads that ``--heads`` or the file says, by number or by model; None if neither does.

    Raises:
        CheckpointError: they contradict each other.
    """
    stated = said.number("num_heads", "n_heads", "num_attention_heads")
    if stated is None and source.heads is None and (model := said.model) and model[2]:
        return PRESETS[f"DiT-{model[2].upper()}"][2]
    if stated is not None and source.heads not in (None, stated):
        raise CheckpointError(
            f"{said.source}: its training arguments say {stated} heads, --heads says {source.heads}; leave --heads out "
            f"to go by the file, or {ALONE.replace('their shapes', '--heads')}"
        )
    if source.heads is not None or stated is None:
        return source.heads
    return int(stated)


def check_model(source: Source, said: Statements, spec: ModelSpec, channels: int, factor: int) -> None:
    """Check that the training arguments speak of the model that the weights' shapes describe.

    Args:
        source: the options; ``--heads`` says that the model is none of the paper's, whatever name it was given.
        said: the training arguments.
        spec: the model, by its shapes.
        channels: the network's output channels.
        factor: image pixels per latent pixel.

    Raises:
        CheckpointError: they say something else; it names both.
    """
    found = {
        "in_channels": (spec.latent_channels, said.number("in_channels")),
        "hidden_size": (spec.width, said.number("hidden_size", "embed_dim", "hidden_dim")),
        "depth": (spec.depth, said.number("depth", "num_layers", "n_layers")),
        "mlp_ratio": (spec.mlp_width / spec.width, said.number("mlp_ratio")),
    }
    for name, (shape, value) in found.items():
        if value is not None and value != shape:
            raise _error_for_contradiction(said, f"{name} = {value:g}", f"the weights' shapes say {shape:g}")
    if (sides := said.sides("patch_size")) not in (None, (spec.patch_size,) * 2):
        stated = f"{sides[0]:g}" if sides[0] == sides[1] else f"{sides[0]:g}x{sides[1]:g}"
        raise _error_for_contradiction(said, f"patch_size = {stated}", f"the weights' shapes say {spec.patch_size}")
    learned = said.flag("learn_sigma")
    if learned is not None and learned != (channels == 2 * spec.latent_channels):
        raise _error_for_contradiction(
            said, f"learn_sigma = {learned}", f"there are {channels} output channels for {spec.latent_channels}"
        )
    normalizes = said.flag("qk_norm", "use_qknorm")
    if normalizes is not None and normalizes != (spec.qk_norm != "none"):
        has = "have" if spec.qk_norm != "none" else "have no"
        raise _error_for_contradiction(said, f"qk_norm = {normalizes}", f"the weights {has} norms of queries and keys")
    for names, is_there, what in (
        (("use_swiglu", "swiglu"), spec.mlp == "swiglu", "SwiGLU"),
        (("use_rope", "rope"), spec.rotary, "rotary positions"),
        (("use_rmsnorm", "rmsnorm"), spec.norm == "rms", "RMSNorm"),
    ):
        flag = said.flag(*names)
        if flag is not None and flag != is_there:
            raise _error_for_contradiction(
                said, f"{names[0]} = {flag}", f"the weights are {'with' if is_there else 'without'} {what}"
            )
    if part := next((name for name in NO_PARTS if said.flag(name)), None):
        raise _error_for_contradiction(said, f"{part} = True", "a DiT or SiT with the official names has no such part")
    _check_model_name(source, said, spec)
    _check_image_size(source, said, spec, factor)


def check_parts(source: str, family: str, spec: ModelSpec) -> None:
    """Check that a family has the parts of a model. Raises CheckpointError where only another has them."""
    parts = {"RMSNorm": spec.norm == "rms", "SwiGLU": spec.mlp == "swiglu", "rotary positions": spec.rotary}
    if family != "lightningdit" and (found := [name for name, has in parts.items() if has]):
        raise CheckpointError(f"{source}: has {' and '.join(found)}, --family says {family}; leave --family out")
    if family != "meanflow" and spec.times > 1:
        raise CheckpointError(
            f"{source}: has a second timestep embedder, which {family} has not; say --family meanflow for a MeanFlow"
        )
    if spec.times > 1 and spec.conditioning not in MODULATIONS:
        raise CheckpointError(
            f"{source}: has a second timestep embedder with {spec.conditioning} conditioning; expected a MeanFlow with "
            f"{' or '.join(MODULATIONS)}, as all published ones have"
        )


def _check_model_name(source: Source, said: Statements, spec: ModelSpec) -> None:
    model = said.model
    if model is None or model[2] is None:
        return
    depth, width, _ = PRESETS[f"DiT-{model[2].upper()}"]
    if source.heads is None and (depth, width) != (spec.depth, spec.width):
        raise _error_for_contradiction(
            said,
            f"{model.string[:60]} ({depth} blocks of width {width})",
            f"the weights have {spec.depth} of width {spec.width}",
            "say --heads N to go by the weights",
        )
    if (depth, width) == (spec.depth, spec.width) and int(model[3]) != spec.patch_size:
        raise _error_for_contradiction(said, model.string[:60], f"the weights have patches of {spec.patch_size}")


def _check_image_size(source: Source, said: Statements, spec: ModelSpec, factor: int) -> None:
    height, width = (side * factor for side in spec.latent_size)
    sides = said.sides("image_size", "resolution", "img_size")
    if sides is not None and sides != (height, width) and (height, width) not in source.image_sizes:
        raise _error_for_contradiction(
            said,
            f"images of {sides[0]:g}x{sides[1]:g}",
            f"the positional table is of {height}x{width} with this autoencoder",
            f"say --vae for the one it was trained with, or --size {height}x{width} to go by the table",
        )
    sides = said.sides("input_size", "latent_size")
    if sides is not None and sides != spec.latent_size:
        raise _error_for_contradiction(
            said,
            f"latents of {sides[0]:g}x{sides[1]:g}",
            f"the positional table is of {height // factor}x{width // factor}",
        )


def _error_for_contradiction(said: Statements, statement: str, weights: str, cure: str = ALONE) -> CheckpointError:
    return CheckpointError(f"{said.source}: its training arguments say {statement}, and {weights}; {cure}")
