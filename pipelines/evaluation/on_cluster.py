"""The actor of an evaluation on a cluster: it holds the model, and scores chunks of a split."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray

from animediffusion.models.bundle import bundle_files, load_bundle_files
from animediffusion.models.network.attention import Backend, chosen_attention, use_attention
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.evaluate import ChunkScores, score_chunk
from animediffusion.platform.cluster.actors import run_on_actors
from animediffusion.platform.storage import storage


class ScoreChunks:
    """Class for Ray Data's map_batches(): an instance per actor.

    Args:
        files: a reference to the files of the bundle in Ray's object store.
        data: the dataset.
        split: name of the split.
        attention: attention of the driver.
        threads: threads of torch; None is its default.
    """

    def __init__(
        self,
        files: ray.ObjectRef[Mapping[str, bytes]],
        data: str,
        split: str,
        attention: Backend,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        use_attention(attention)
        storage.expect(data)
        self._data, self._split = data, split
        self._bundle = load_bundle_files(ray.get(files), "cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[bytes]]:
        """Score the chunks of the columns `start` and `rows`."""
        chunks = zip(batch["start"].tolist(), batch["rows"].tolist(), strict=True)
        made = [
            score_chunk(self._bundle, read_split(self._data, self._split, rows, start), start) for start, rows in chunks
        ]
        return {"scores": [pickle.dumps(one) for one in made]}


def score_on_cluster(folder: Path, data: str, split: str, chunks: Sequence[tuple[int, int]]) -> Iterator[ChunkScores]:
    """Yield the scores of chunks (first row, number of rows), in any order; the caller connects to Ray first.

    Raises:
        ClusterError: an actor or the cluster failed.
    """
    files = ray.put(bundle_files(folder))
    arguments = (files, storage.absolute(data), split, chosen_attention())
    blocks = [pa.table({"start": [start], "rows": [rows]}) for start, rows in chunks]
    threads = torch.get_num_threads()
    for row in run_on_actors(blocks, ScoreChunks, arguments, threads=threads, command="evaluate --on-cluster"):
        scores: ChunkScores = pickle.loads(row["scores"])
        yield scores
