from enum import Enum

from torchvision import __getattr__

# transformers makes a table of these when it is imported.
InterpolationMode = Enum("InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS")
