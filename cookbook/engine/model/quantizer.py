"""The quantizers with which transformers loads a model in 4 or 8 bits: linear layers and stacked experts.

Each weight is quantised as soon as it is on the device, so that no more than one is there unquantised.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from cookbook.engine.model import fp8, stacked_4bit
from cookbook.engine.model.expert_forms import form_of, num_flat_experts
from cookbook.engine.model.targets import find_targets, is_plain
from cookbook.utils import pretrained

_METHOD = "bitsandbytes_4bit_with_experts"
_FP8 = "float8_with_experts"
_NOT_QUANTIZED = ("routers", "indexers", "layers read directly")


class LayersAndExpertsConfig(BitsAndBytesConfig):
    """Chooses the quantizer of this file."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(load_in_4bit=True, **settings)
        self.quant_method = _METHOD  # type: ignore[assignment]


class LayersAndExperts(Bnb4BitHfQuantizer):
    """Quantises linear layers and the stacked weights of experts, but nothing that only chooses experts."""

    def get_modules_to_not_convert(  # type: ignore[override]
        self, model: Any, *others: Any, **options: Any
    ) -> list[str]:
        """Returns patterns of the names of layers whose weight is kept as it is."""
        return [*super().get_modules_to_not_convert(model, *others, **options), *_not_quantized(model)]

    def _process_model_before_weight_loading(self, model: Any, *others: Any, **options: Any) -> None:
        _prepare(model)
        super()._process_model_before_weight_loading(model, *others, **options)

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if (form := form_of(module)) is not None:
            return name in form.names
        if num_flat_experts(module) is not None:
            return True
        return bool(super().param_needs_quantization(model, param_name, **options))

    def get_quantize_ops(self) -> Any:
        return _Quantize(self, super().get_quantize_ops())


class _Quantize(ConversionOps):
    """Quantises the weights that a step of loading has made."""

    def __init__(self, quantizer: LayersAndExperts, of_layers: Any) -> None:
        self._settings, self._of_layers = quantizer.quantization_config, of_layers

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, **others: Any
    ) -> dict[str, Tensor | nn.Parameter]:
        results: dict[str, Tensor | nn.Parameter] = {}
        for name, value in input_dict.items():
            module, _ = get_module_from_name(model, name)
            num_flat = num_flat_experts(module)
            if num_flat is None and form_of(module) is None:
                results |= self._of_layers.convert({name: value}, model=model, **others)
                continue
            weight = value[0] if isinstance(value, list) else value
            results[name] = stacked_4bit.quantize(
                weight,
                self._settings.bnb_4bit_compute_dtype,
                num_flat,
                quant_type=self._settings.bnb_4bit_quant_type,
                compress_statistics=self._settings.bnb_4bit_use_double_quant,
            )
        return results


class Fp8Config(QuantizationConfigMixin):
    """Chooses `Fp8Quantizer`."""

    def __init__(self) -> None:
        self.quant_method = _FP8  # type: ignore[assignment]


class Fp8Quantizer(HfQuantizer):
    """Quantises the same weights as `LayersAndExperts`, in 8 bits."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.scales: dict[str, Tensor] = {}
        """The scales by the name of their weight. Loading would overwrite buffers of the model with them."""

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        _prepare(model)
        skipped = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        skipped += _not_quantized(model)
        for name, module in model.named_modules():
            if type(module) is nn.Linear and should_convert_module(name, skipped):
                module.__class__ = fp8.Fp8Linear

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if (form := form_of(module)) is not None:
            return name in form.names
        return isinstance(module, fp8.Fp8Linear) and name == "weight"

    def get_quantize_ops(self) -> Any:
        return _QuantizeInFp8(self)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        for full_name, scale in self.scales.items():
            module, name = get_module_from_name(model, full_name)
            module.register_buffer(name + fp8.SCALE, scale, persistent=False)
        self.scales = {}


class _QuantizeInFp8(ConversionOps):
    """Quantises the weights that a step of loading has made."""

    def __init__(self, quantizer: Fp8Quantizer) -> None:
        self._quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], **others: Any
    ) -> dict[str, Tensor | nn.Parameter]:
        results: dict[str, Tensor | nn.Parameter] = {}
        for name, value in input_dict.items():
            held, self._quantizer.scales[name] = fp8.quantize(value[0] if isinstance(value, list) else value)
            results[name] = nn.Parameter(held, requires_grad=False)
        return results


def _prepare(model: Any) -> None:
    """Lets transformers find a model's head, which it leaves as it is, and all linear layers.

    It quantises no subclass of nn.Linear, so layers that compute the same become plain ones.
    """
    pretrained.find_parts(model)
    for module in model.modules():
        is_of_model = type(module).__module__.startswith("transformers.models.")
        if is_of_model and isinstance(module, nn.Linear) and is_plain(module):
            module.__class__ = nn.Linear


def _not_quantized(model: Any) -> list[str]:
    """Returns patterns of names: of layers that only choose experts, or whose weights are read directly."""
    kinds = find_targets(model).kinds
    return [f"{name}$" for name, kind in kinds.items() if kind in _NOT_QUANTIZED]


AUTO_QUANTIZER_MAPPING[_METHOD] = LayersAndExperts
AUTO_QUANTIZER_MAPPING[_FP8] = Fp8Quantizer
