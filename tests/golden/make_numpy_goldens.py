#!/usr/bin/env python3
"""Files as NumPy writes them, for tests/unit/io_npy.cpp. Made with numpy 2.4.6; any version of numpy writes these bytes but for zip dates."""

import pathlib

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent / "numpy"


def main():
    HERE.mkdir(exist_ok=True)
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 8
    np.save(HERE / "f4.npy", values)
    np.save(HERE / "f4_fortran.npy", np.asfortranarray(values))
    np.save(HERE / "f8_big_endian.npy", values.astype(">f8"))
    np.save(HERE / "scalar.npy", np.int64(-5))
    np.save(HERE / "vector.npy", np.array([True, False, True]))
    np.save(HERE / "empty.npy", np.zeros((0, 3), np.float16))
    np.save(HERE / "complex.npy", np.zeros(2, np.complex64))
    np.save(HERE / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(HERE / "records.npy", np.zeros(2, dtype=[("a", "<f4"), ("b", "<i4")]))
    np.savez(HERE / "several.npz", first=values, second=np.array([[1, 2], [3, 4]], np.uint8), third=values[0].astype(np.float16))
    np.savez_compressed(HERE / "compressed.npz", first=values)


if __name__ == "__main__":
    main()
