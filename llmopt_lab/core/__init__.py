"""What every chapter stands on: trace, memory, costs, errors, device, benchmarks, tolerances."""
