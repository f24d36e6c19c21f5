"""The paper's input, N(0, 1), one layer at a time: sums over samples (`moments`), then measured layers (`gaussian`)."""
