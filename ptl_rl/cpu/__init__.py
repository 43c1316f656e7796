"""Run the stack (verl, vLLM, Ray) on machines without an accelerator.

Stock verl knows CUDA, ROCm and NPU only, and vLLM's CPU build ships under another distribution
name. This package adds what is missing, through verl's and vLLM's plugin hooks wherever they
exist, and stays inert as soon as an accelerator is present. Import what you need from the
submodules; importing the package itself costs nothing.
"""
