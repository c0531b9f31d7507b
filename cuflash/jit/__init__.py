"""From CUDA sources and constants to launches; nothing above this package knows NVRTC."""
