"""How the configuration of a compressed-tensors checkpoint quantised each module.

Its groups name modules, classes or regular expressions, and each has a scheme: bits, type, and what shares a scale.
Only what says how weights are stored is read; how activations and caches are quantised does not matter here. ModelOpt's
NVFP4 is the same format under other names. compressed-tensors is an extra, so it is imported here on first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emloc_tools.errors import UnsupportedError

FORMATS = frozenset(
    {
        "dense",
        "fakequant",  # plain weights with scales beside them
        "float-quantized",
        "int-quantized",
        "mixed-precision",  # a format for each group
        "mxfp4-pack-quantized",
        "mxfp6-pack-quantized",
        "mxfp8-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "pack-quantized",
    }
)
OF_WEIGHTS = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "scale_dtype")
MODELOPT = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}


class Schemes:
    """The schemes of a `quantization_config`; `of` gives that of a module."""

    def __init__(self, quantisation: Mapping[str, Any]) -> None:
        self._format = quantisation.get("format")
        groups = groups_of(quantisation)
        if quantisation.get("quant_method") == "modelopt":
            groups, self._format = [MODELOPT], "nvfp4-pack-quantized"
        self._groups = [(_targets(group), self._scheme(group)) for group in groups if group.get("weights")]

    def of(self, module: str) -> Any:
        """The library's scheme for the module of a checkpoint, with its format filled in.

        A group that names the module, by itself or by a pattern, comes before one for a class of modules. Raises
        `UnsupportedError` if no group or more than one could have quantised it.
        """
        from compressed_tensors.utils import match_name

        if len(self._groups) == 1:
            return self._groups[0][1]
        by_name = [scheme for targets, scheme in self._groups if any(match_name(module, t) for t in targets)]
        by_class = [scheme for targets, scheme in self._groups if any("." not in t and ":" not in t for t in targets)]
        if by_name:
            return by_name[0]
        if len(by_class) == 1:
            return by_class[0]
        raise UnsupportedError(
            f"{module} is quantised, and {len(by_class) or 'none'} of the groups in config.json's quantization_config "
            "could be its own; use the model's full-precision release"
        )

    def _scheme(self, group: Mapping[str, Any]) -> Any:
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from torch import nn

        weights = group["weights"]
        try:
            arguments = QuantizationArgs(**{key: weights[key] for key in OF_WEIGHTS if key in weights})
            scheme = QuantizationScheme(targets=_targets(group), weights=arguments)
        except (ValueError, TypeError, AttributeError) as error:
            raise UnsupportedError(
                "a group of quantization_config in config.json is not one that compressed-tensors reads: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        stated = group.get("format") or self._format
        unknown = stated in (None, "mixed-precision", "dense", "fakequant")
        scheme.format = infer_module_format(nn.Linear, scheme).value if unknown else stated
        return scheme


def is_compressed_tensors(quantisation: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says that weights are stored in a way that this library gives back.

    Not so for sparse weights, and for those that a transform rotated and the model has to rotate back.
    """
    if quantisation.get("quant_method") == "modelopt":
        return quantisation.get("quant_algo") == "NVFP4"
    formats = {quantisation.get("format"), *(group.get("format") for group in groups_of(quantisation))} - {None}
    return quantisation.get("quant_method") == "compressed-tensors" and formats <= FORMATS and not extras(quantisation)


def extras(quantisation: Mapping[str, Any]) -> dict[str, str]:
    """What is done to the weights of a compressed-tensors checkpoint beside quantising: sparsity and transforms."""
    sparsity, transforms = (quantisation.get(key) for key in ("sparsity_config", "transform_config"))
    found = {}
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        found["sparsity"] = str(sparsity["format"])
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        found["transforms"] = ", ".join(map(str, transforms["config_groups"]))
    return found


def groups_of(quantisation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The groups of a `quantization_config`."""
    groups = quantisation.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _targets(group: Mapping[str, Any]) -> list[str]:
    return [str(target) for target in group.get("targets") or ()]
