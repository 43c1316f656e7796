"""How a model is read, and what every channel and block of it contributes."""
