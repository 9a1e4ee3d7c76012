import models  # noqa: F401  # which cures torchvision, before timm and torch-fidelity import it
