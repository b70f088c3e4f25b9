"""Small DICOM and NIfTI files made by pydicom and nibabel, and the reader to try them with."""

import io

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from client.images.decode import guarded_pillow
from client.images.formats import open_picture
from client.images.records import WHOLE, SkipReason, Unusable
from common.preprocessing import eight_bits

CT = "1.2.840.10008.5.1.4.1.1.2"
LIMIT = 1_000_000


def opened(content, view=WHOLE, *, max_pixels=LIMIT, **more):
    """The picture, or the reason why there is none."""
    with guarded_pillow(max_pixels):
        try:
            return open_picture(content, view, max_pixels=max_pixels, **more)
        except Unusable as unusable:
            return unusable.reason


def screen(content, view=WHOLE, **more):
    """The picture as uint8, as a screen shows it; fails where there is none."""
    picture = opened(content, view, **more)
    assert not isinstance(picture, SkipReason), picture
    return eight_bits(picture)


def dicom(pixels, *, syntax=ExplicitVRLittleEndian, preamble=True, frames=0, **elements):
    """Bytes of a DICOM file with these stored values (H, W[, 3]) or, with `frames`, (frames, H, W)."""
    pixels = np.asarray(pixels)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CT
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.file_meta.TransferSyntaxUID = syntax
    shape = pixels.shape[1:] if frames else pixels.shape
    if frames:
        dataset.NumberOfFrames = frames
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = 3 if len(shape) == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
    if len(shape) == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelData = pixels.tobytes()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OB" if dataset.BitsAllocated <= 8 else "OW"
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, dataset, enforce_file_format=preamble)
    return stream.getvalue()


def nifti(voxels, *, affine=None, kind=nibabel.Nifti1Image, slope=None, intercept=0.0, zipped=False):
    """Bytes of a NIfTI file."""
    image = kind(np.asarray(voxels), np.eye(4) if affine is None else affine)
    if slope is not None:
        image.header.set_slope_inter(slope, intercept)
    content = image.to_bytes()
    if not zipped:
        return content
    import gzip

    return gzip.compress(content)
