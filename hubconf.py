"""`torch.hub.load("OWNER/REPOSITORY", "bat_deit_small_patch16_224", keep_rate=0.7)`."""

dependencies = ["torch", "timm"]

from models import make_reducing  # noqa: E402, F401 (entry points of torch.hub)
from models.bat import (  # noqa: E402, F401
    bat_deit_base_patch16_224,
    bat_deit_small_patch16_224,
    bat_deit_tiny_patch16_224,
)
