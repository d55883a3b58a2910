"""What every chapter stands on: trace, memory model, costs, errors, device, benchmark, tolerances."""
