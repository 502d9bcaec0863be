"""What `benchmarks/gpu.sh` measures: training and sampling on one device, within a time budget."""
