"""What is wrong with a compiled kernel: limits for what compile_worker.py finds."""

import re

import triton

# Bytes a thread may spill to local memory. Float32 holds twice the accumulators and is there to be right, not fast.
MOST_SPILLED = 1024
# Hopper kernels, and their functions that multiply. They spill nothing, but for a few words outside of decode's loops
# where another Triton's ptxas decides so: row pointers of the gather with 3.7, the epilogue with
# 3.9 (which no engine pins yet).
HOPPER = {
    "gluon_sm90": ("_decode_kernel", "_decode_few_kernel", "_decode_codes_kernel", "_decode_tiles_kernel"),
    "gluon_sm90_ragged": ("_prefill_kernel",),
}
HOPPER_SPILLED = {
    ("_decode_kernel", "3.7"): 16,
    ("_decode_kernel", "3.9"): 160,
    ("_decode_few_kernel", "3.7"): 48,
    ("_decode_few_kernel", "3.9"): 128,
    ("_decode_codes_kernel", "3.9"): 384,
    ("_decode_tiles_kernel", "3.9"): 384,
}
GATHER_SPILLED = 8  # a word that waits until rows are read one by one, with fixed splits or few query rows
SPLITS_SPILLED = 24  # what a request begins with, where registers are few so that a program of the merge fits beside
WIDE_SPLITS_SPILLED = 216  # what pieces begin and end with, where accumulators of 64 queries are columns
UNPACK_SPILLED = 128  # what pieces begin and end with, where accumulators, scores and codes all want registers
# The same, mostly, where codes become float16 in registers; with 64 queries ten words are in the loop over blocks.
CODES_SPILLED = 112
# The same with a scale for each tile. 16 queries come to 104 with Triton 3.6, and to more where rows are read one by
# one; with 32 queries some of it is in the loop: sums and references, while scores are taken.
TILES_SPILLED = 232
SERIALISED = re.compile(r"C75(?:10|12|14|17)|serialized", re.IGNORECASE)  # what ptxas remarks about wgmma
GATHERED = (1, 48)  # pages that no TMA box fits


def faults(row: dict) -> list[str]:
    """What is wrong with one compiled kernel, "wanted, got"."""
    wrong = []
    if row["shared"] > row["limit"]:
        wrong.append(f"at most {row['limit']} bytes of shared memory, got {row['shared']}")
    hopper = row["kernel"] in HOPPER
    most = HOPPER_SPILLED.get((row["function"], triton.__version__[:3]), 0) if hopper else MOST_SPILLED
    splits, few = "fixed splits" in row["variant"], row["function"] == "_decode_few_kernel"
    crowded = splits or few
    packed = row["cache"] == "fp8_ds_mla"
    if crowded and row["page_size"] in GATHERED:
        most = max(most, GATHER_SPILLED)
    if row["function"] == "_decode_codes_kernel":
        most = max(most, CODES_SPILLED)
    if row["function"] == "_decode_tiles_kernel":
        most = max(most, TILES_SPILLED)
    if few and splits:
        most = max(most, WIDE_SPLITS_SPILLED if row["query_rows"] > 32 else SPLITS_SPILLED)
    if row["function"] == "_decode_kernel" and packed:
        most = max(most, UNPACK_SPILLED)
    if row["spilled"] > most:
        wrong.append(f"at most {most} bytes spilled, got {row['spilled']}")
    if not hopper:
        return wrong
    wrong += row["serialised"]
    if row["unordered_arrivals"]:
        wrong.append(f"every arrival behind its group's barrier, got {row['unordered_arrivals']} that are not")
    count = row["instructions"]
    if row["function"] in HOPPER[row["kernel"]]:
        unpacked = packed and row["function"] == "_decode_kernel"
        copies = () if unpacked else ("ARRIVES",) if row["page_size"] in GATHERED else ("UTMALDG",)
        wrong += [f"{name} in the machine code, got none" for name in ("HGMMA", *copies) if not count[name]]
    unwanted = ("HMMA",) if most else ("HMMA", "LDL", "STL")
    wrong += [f"no {name} in the machine code, got {count[name]}" for name in unwanted if count.get(name)]
    return wrong
