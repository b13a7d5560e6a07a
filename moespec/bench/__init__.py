"""Benchmarks of decoding: what is compared, how it is timed, how far lossy text strays. `python -m moespec bench`."""
