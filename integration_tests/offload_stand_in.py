"""vLLM's OffloadingConnector on a CPU, where it has everything but the copies: they are made here, in torch, of the
pages as the connector has described them from our cache."""


def stand_in() -> None:
    """Call before the engine is made."""
    from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    class Copies(OffloadingWorker):
        """Copies at once what vLLM copies beside its steps."""

        def __init__(self, kv_caches):
            self._pools = [pool.tensor for pool in kv_caches.tensors]
            self._kept, self._done = {}, []

        def submit_store(self, job_id, src_spec, dst_spec) -> bool:
            for page, chunk in zip(src_spec.block_ids.tolist(), dst_spec.block_ids.tolist(), strict=True):
                self._kept[chunk] = [pool[page].clone() for pool in self._pools]
            return self._ended(job_id)

        def submit_load(self, job_id, src_spec, dst_spec) -> bool:
            for chunk, page in zip(src_spec.block_ids.tolist(), dst_spec.block_ids.tolist(), strict=True):
                for pool, kept in zip(self._pools, self._kept[chunk], strict=True):
                    pool[page] = kept
            return self._ended(job_id)

        def _ended(self, job_id: int) -> bool:
            self._done.append(TransferResult(job_id, success=True))
            return True

        def get_finished(self) -> list[TransferResult]:
            done, self._done = self._done, []
            return done

        def wait(self, job_ids) -> None:
            pass

    def get_worker(self, kv_caches):
        if not self._worker:
            self._worker = Copies(kv_caches)
        return self._worker

    CPUOffloadingSpec.get_worker = get_worker
