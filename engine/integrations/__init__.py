"""Our kernels inside other people's training: one module a library, imported only by whoever uses that library."""
