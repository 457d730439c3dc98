"""Downloads a checkpoint and builds an adapter and a merged model of it: weights.py LOG."""

import sys
from pathlib import Path

import tinker
from tinker_cookbook import weights

log = Path(sys.argv[1])
with tinker.ServiceClient() as service:
    # This model's projection is that of its embeddings, into which tinker-cookbook merges no adapter.
    training = service.create_lora_training_client(
        base_model="Qwen/Qwen3-8B", rank=4, train_unembed=False
    ).result()
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 5, 6]), loss_fn_inputs={"target_tokens": [5, 6, 7]}
    )
    training.forward_backward([datum], "cross_entropy").result()
    training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    path = training.save_state("trained").result().path
folder = weights.download(tinker_path=path, output_dir=str(log / "adapter"))
print(sorted(file.name for file in Path(folder).iterdir()))
weights.build_lora_adapter(base_model="Qwen/Qwen3-8B", adapter_path=folder, output_path=str(log / "peft"))
weights.build_hf_model(base_model="Qwen/Qwen3-8B", adapter_path=folder, output_path=str(log / "merged"))
assert (log / "merged" / "config.json").exists()
