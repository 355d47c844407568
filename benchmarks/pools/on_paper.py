"""What many GPUs would make in an hour: a prediction from measured costs."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.harness.environment import result_file
from benchmarks.harness.timing import rounded

# The fastest GPU that was predicted is the hardest case for all that is shared. Iterations with so
# many patches: 4000 with the published stops, and the 100 of smi_fast.recipes.clear().
GPU, TEACHER, PRECISION = "H100 SXM", "deit_small", "bfloat16"
RUNS = {
    "4000 iterations": {"196": 50, "137": 50, "95": 100, "66": 100, "46": 3700},
    "100 iterations": {"196": 10, "95": 90},
}


def images_a_second(run: str) -> float:
    """The most that a GPU can invert, from the least time of its iterations in roofline.json."""
    roofline = json.loads(result_file("roofline.json").read_text())
    steps = roofline["predictions"][TEACHER][PRECISION][GPU]["steps"]
    milliseconds = sum(
        count * steps[kept]["predicted_floor_ms"] for kept, count in RUNS[run].items()
    )
    return float(1000 * roofline["images"] / milliseconds)


def together(
    images_a_second: float,
    *,
    gpus: int,
    batch: int,
    writer_ms: float,
    store_ms: float,
    store_batches_a_second: float,
    gather_ms: float,
) -> dict[str, float]:
    """Images an hour of many processes with one GPU each.

    - A process inverts a batch while it writes the one before, so the slower of the two counts, and
      then it asks the store for the next one.
    - All processes share the store.
    - In the end process 0 reads and checks the records, while the others wait.

    Args:
        images_a_second: that a GPU inverts.
        gpus: number of processes.
        batch: images of a batch.
        writer_ms: that one writer takes for an image.
        store_ms: that a process waits for the store in each batch.
        store_batches_a_second: that the store serves at most.
        gather_ms: of an image in the end.
    """
    own = min(images_a_second, 1000 / writer_ms)
    made = gpus * batch / (batch / own + store_ms / 1000)
    made = min(made, batch * store_batches_a_second)
    whole = 1 / (1 / made + gather_ms / 1000)
    return {
        "images_a_second_of_a_gpu_alone": rounded(images_a_second),
        "images_a_second_of_a_writer": rounded(1000 / writer_ms),
        "images_an_hour": rounded(3600 * whole),
        "share_of_gpus_alone": rounded(whole / (gpus * images_a_second), 3),
    }


def predict(measured: dict[str, Any], gpus: int, batch: int) -> dict[str, Any]:
    """What many GPUs would make, from the costs that :mod:`benchmarks.pools.measure` found."""
    writer, clients = measured["writer"], measured["store"]["clients"]
    many = measured["many_images"]
    seconds = max(uses["resume"]["seconds"] for uses in many["uses"].values())
    costs = {
        "writer_ms": writer["encode_ms_of_an_image"] + writer["write_ms_of_an_image"],
        "store_ms": clients[min(clients, key=int)]["ms_of_a_batch"],
        "store_batches_a_second": clients[max(clients, key=int)]["batches_a_second"],
        "gather_ms": 1000 * seconds / many["images"],
    }
    return {
        "what": "prediction from costs measured here and the least times of roofline.json",
        "gpu": GPU,
        "teacher": TEACHER,
        "precision": PRECISION,
        "gpus": gpus,
        "batch": batch,
        **{run: together(images_a_second(run), gpus=gpus, batch=batch, **costs) for run in RUNS},
    }
