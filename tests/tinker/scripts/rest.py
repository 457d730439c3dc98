"""Lists and removes checkpoints, and samples in another process: rest.py LOG."""

import asyncio
import multiprocessing

import tinker

PROMPT = tinker.ModelInput.from_ints([1, 20, 30, 40])
GREEDY = tinker.SamplingParams(max_tokens=6, temperature=0.0)


def sample(client: tinker.SamplingClient) -> list[int]:
    return client.sample(PROMPT, num_samples=1, sampling_params=GREEDY).result().sequences[0].tokens


async def main() -> None:
    service = tinker.ServiceClient(user_metadata={"made_by": "rest.py"})
    training = service.create_lora_training_client(base_model="Qwen/Qwen3-8B", rank=4).result()
    state = training.save_state("one", ttl_seconds=3600).result().path
    sampler = training.save_weights_for_sampler("one").result().path
    client = tinker.RestClient()
    run = await client.get_training_run_by_tinker_path(state)
    assert run.user_metadata == {"made_by": "rest.py"}
    assert run.lora_rank == 4
    listed = {one.tinker_path for one in (await client.list_checkpoints(run.training_run_id)).checkpoints}
    assert listed == {state, sampler}, listed
    info = await client.get_weights_info_by_tinker_path(sampler)
    assert info.is_lora
    await client.delete_checkpoint_from_tinker_path(state)
    listed = {one.tinker_path for one in (await client.list_checkpoints(run.training_run_id)).checkpoints}
    assert listed == {sampler}
    try:
        service.create_training_client_from_state(state).result()
    except tinker.TinkerError as error:
        print(type(error).__name__, error)
    else:
        raise AssertionError("a removed checkpoint was loaded")
    sampling = service.create_sampling_client(model_path=sampler).result()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(sample, (sampling,)) == sample(sampling)


if __name__ == "__main__":
    asyncio.run(main())
