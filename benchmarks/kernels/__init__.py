"""How fast is each kernel, and what is its machine code? `fastcm bench kernels`: cases in, times, bytes and instructions out."""
