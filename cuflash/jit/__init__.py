"""From CUDA source files and constants to launches: nothing above this package knows what NVRTC is."""
