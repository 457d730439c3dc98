"""`VLLMSamplingClient`, under the name that users import it by."""

from cookbook.clients.vllm import VLLMSamplingClient

__all__ = ["VLLMSamplingClient"]
