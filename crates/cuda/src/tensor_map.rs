//! Tensor maps: what Hopper's copy engine has to know of a matrix.

use std::ffi::c_void;

use cudarc::driver::sys;

use crate::Result;
use crate::error::Called;

/// A matrix of bytes, of which the copy engine brings boxes of 128 bytes and some rows into shared memory: row r of a
/// box at byte 128 r, its 16-byte chunk i at place i ^ (r % 8), and zeros for what lies outside the matrix.
#[derive(Debug, Clone, Copy)]
pub struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// Of `rows` rows of `row_bytes` each, one behind the other from an address on; a box has `box_rows` rows, at most
    /// 256. Address and `row_bytes` are multiples of 16.
    pub fn new(address: u64, [rows, row_bytes]: [usize; 2], box_rows: u32) -> Result<Self> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (size, pitch) = ([row_bytes as u64, rows as u64], [row_bytes as u64]);
        let (tile, steps) = ([128, box_rows], [1, 1]);
        // SAFETY: writes the map alone; sizes, pitch, box and steps are of the two dimensions that are named. The
        // address is not followed here.
        let made = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
                2,
                address as *mut c_void,
                size.as_ptr(),
                pitch.as_ptr(),
                tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        made.result().called("cuTensorMapEncodeTiled")?;
        Ok(Self(map))
    }

    /// As a kernel takes it, by value.
    pub fn as_bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0.opaque)
    }
}
