from interop import *  # temporary
from interop import ablate, attach, steer
