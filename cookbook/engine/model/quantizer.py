"""The quantizer with which transformers loads a model in 4 bits: linear layers and experts' stacked weights.

Each weight is quantised as soon as it is on the device, so that no more than one is there unquantised.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from cookbook.engine.model import stacked_4bit
from cookbook.engine.model.expert_forms import form_of
from cookbook.engine.model.targets import find_targets, is_plain

_METHOD = "bitsandbytes_4bit_with_experts"
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
        kinds = find_targets(model).kinds
        skipped = super().get_modules_to_not_convert(model, *others, **options)
        return [*skipped, *(f"{name}$" for name, kind in kinds.items() if kind in _NOT_QUANTIZED)]

    def _process_model_before_weight_loading(self, model: Any, *others: Any, **options: Any) -> None:
        for module in model.modules():  # transformers quantises no subclass of nn.Linear
            kind = type(module)
            is_subclass = isinstance(module, nn.Linear) and kind.__module__.startswith("transformers.models.")
            if is_subclass and is_plain(module):
                module.__class__ = nn.Linear
        super()._process_model_before_weight_loading(model, *others, **options)

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if (form := form_of(module)) is not None:
            return name in form.names
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
            if form_of(module) is None:
                results |= self._of_layers.convert({name: value}, model=model, **others)
                continue
            weight = value[0] if isinstance(value, list) else value
            results[name] = stacked_4bit.quantize(
                weight,
                self._settings.bnb_4bit_compute_dtype,
                quant_type=self._settings.bnb_4bit_quant_type,
                compress_statistics=self._settings.bnb_4bit_use_double_quant,
            )
        return results


AUTO_QUANTIZER_MAPPING[_METHOD] = LayersAndExperts
