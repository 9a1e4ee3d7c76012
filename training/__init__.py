import models  # noqa: F401  # which cures torchvision, before diffusers may import it
