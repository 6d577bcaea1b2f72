# Any name.
from torchvision import __getattr__
