"""The bundled demo model: a small GPT-2, its corpus writer, trainer and evaluation."""
