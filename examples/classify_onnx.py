"""The most probable classes of a picture, with nothing but ONNX Runtime, NumPy and Pillow.

python classify_onnx.py photos.onnx cat.jpg          photos.onnx: what empf.export_onnx wrote
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

network, picture = sys.argv[1:]
session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
origin = json.loads(session.get_modelmeta().custom_metadata_map["origin"])  # class names and normalisation
_, channels, height, width = session.get_inputs()[0].shape

with Image.open(picture) as image:
    image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
# as test images were: of several sizes their middle 7/8, of one size all
method, edge = (Image.Resampling.BILINEAR, 1 / 16) if origin["resized"] else (Image.Resampling.BICUBIC, 0)
image = ImageOps.fit(image, (width, height), method, bleed=edge)

x = np.asarray(image, np.float32).reshape(height, width, channels) / 255
x = (x - np.float32(origin["mean"])) / np.float32(origin["std"])
(logits,) = session.run(None, {"x": x.transpose(2, 0, 1)[None]})  # T 1 classes
mean = logits[:, 0].mean(0)
share = np.exp(mean - mean.max())
share /= share.sum()
for best in share.argsort()[::-1][:3]:
    print(f"{share[best]:6.1%}  {origin['classes'][best]}")
