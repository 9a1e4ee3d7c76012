import models  # noqa: F401  # which cures torchvision, before what is tested against imports it
