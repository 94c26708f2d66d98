//! NVRTC: kernel sources to machine code for one architecture. It needs no card, so sources are checked anywhere.

use std::ffi::CString;
use std::io::Write;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result, sys};

use crate::libraries::libraries;
use crate::{Error, Result, Unit, config};

/// What machine code is made for, for example `sm_90a`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Architecture(String);

impl Architecture {
    /// That of a compute capability; Hopper's with its matrix instructions.
    pub fn of((major, minor): (u32, u32)) -> Self {
        let own = if (major, minor) == (9, 0) { "a" } else { "" };
        Self(format!("sm_{major}{minor}{own}"))
    }

    /// By its name.
    pub fn named(name: &str) -> Self {
        Self(name.to_owned())
    }

    /// Whether it has Hopper's matrix instructions.
    pub fn is_hopper(&self) -> bool {
        self.0 == "sm_90a"
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

/// The compiler that was found.
#[derive(Debug, Clone)]
pub struct Compiler {
    version: (i32, i32),
}

impl Compiler {
    /// NVRTC as it is installed; 12.0 or newer.
    pub fn new() -> Result<Self> {
        libraries()[1].require()?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the library is loaded, and the call writes two integers.
        unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().map_err(|e| refused(&e))?;
        if major < 12 {
            return Err(Error::TooOld {
                what: "NVRTC".to_owned(),
                got: format!("{major}.{minor}"),
                needed: "12.0",
                remedy: "install a newer one with `pip install nvidia-cuda-nvrtc`",
            });
        }
        Ok(Self { version: (major, minor) })
    }

    /// Its version, for example (13, 0).
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Machine code of a source: from the cache on disk, or compiled and put there.
    pub(crate) fn cubin(
        &self,
        unit: &Unit,
        defines: &[(&str, u32)],
        architecture: &Architecture,
    ) -> Result<Vec<u8>> {
        let Some(folder) = &config().kernel_cache else { return self.compile(unit, defines, architecture) };
        let file = folder.join(self.file_name(unit, defines, architecture));
        if let Some(cubin) = read(&file) {
            return Ok(cubin);
        }
        if let Some(tell) = config().on_compile {
            tell(unit.name);
        }
        let cubin = self.compile(unit, defines, architecture)?;
        // A cache that cannot be written costs the next process a compilation, no more.
        let _ = write(folder, &file, &cubin);
        Ok(cubin)
    }

    /// Everything that the machine code depends on, in a name.
    fn file_name(&self, unit: &Unit, defines: &[(&str, u32)], architecture: &Architecture) -> PathBuf {
        let mut hash = blake3::Hasher::new();
        let mut add = |part: &str| {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        };
        add(unit.source);
        unit.headers.iter().for_each(|(name, text)| [name, text].iter().for_each(|part| add(part)));
        options(defines, architecture).iter().for_each(|option| add(option));
        add(&format!("nvrtc {}.{}", self.version.0, self.version.1));
        let hash = hash.finalize().to_hex();
        PathBuf::from(format!("{}-{}-{}.cubin", unit.name, architecture.name(), &hash[..32]))
    }

    /// Compiles a source with `name = value` definitions.
    pub fn compile(
        &self,
        unit: &Unit,
        defines: &[(&str, u32)],
        architecture: &Architecture,
    ) -> Result<Vec<u8>> {
        let program = create(unit)?;
        // SAFETY: the program was just made; the options are strings without zeros.
        let compiled = unsafe { result::compile_program(program, &options(defines, architecture)) };
        let cubin = match compiled {
            Ok(()) => machine_code(program),
            Err(_) => Err(Error::Compile {
                unit: unit.name.to_owned(),
                arch: architecture.name().to_owned(),
                log: log_of(program),
            }),
        };
        // SAFETY: the program is not used again.
        let _ = unsafe { result::destroy_program(program) };
        cubin
    }
}

fn refused(error: &impl std::fmt::Debug) -> Error {
    Error::Driver { call: "NVRTC", why: format!("{error:?}") }
}

fn options(defines: &[(&str, u32)], architecture: &Architecture) -> Vec<String> {
    let defines = defines.iter().map(|(name, value)| format!("-D{name}={value}"));
    let fixed = [format!("--gpu-architecture={}", architecture.name()), "--std=c++17".to_owned()];
    fixed.into_iter().chain(["-default-device".to_owned()]).chain(defines).collect()
}

/// A program with its headers in memory: none is read from disk.
fn create(unit: &Unit) -> Result<sys::nvrtcProgram> {
    let c = |text: &str| CString::new(text).expect("kernel sources have no zero bytes");
    let (source, name) = (c(unit.source), c(unit.name));
    let headers: Vec<[CString; 2]> = unit.headers.iter().map(|(name, text)| [c(name), c(text)]).collect();
    let pointers = |i: usize| headers.iter().map(|header| header[i].as_ptr()).collect::<Vec<_>>();
    let (names, texts) = (pointers(0), pointers(1));
    let mut program = std::ptr::null_mut();
    // SAFETY: every pointer is to a zero-terminated string that outlives the call, which copies them.
    let made = unsafe {
        sys::nvrtcCreateProgram(
            &raw mut program,
            source.as_ptr(),
            name.as_ptr(),
            headers.len() as i32,
            texts.as_ptr(),
            names.as_ptr(),
        )
    };
    made.result().map_err(|e| refused(&e))?;
    Ok(program)
}

fn machine_code(program: sys::nvrtcProgram) -> Result<Vec<u8>> {
    let mut bytes = 0;
    // SAFETY: the program is compiled; the call writes one size.
    unsafe { sys::nvrtcGetCUBINSize(program, &raw mut bytes) }.result().map_err(|e| refused(&e))?;
    let mut cubin = vec![0u8; bytes];
    // SAFETY: the buffer has the size that was asked for.
    unsafe { sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()) }.result().map_err(|e| refused(&e))?;
    Ok(cubin)
}

fn log_of(program: sys::nvrtcProgram) -> String {
    // SAFETY: the program exists.
    let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let bytes: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A cached file is its content's hash, then the content: half a file is no file.
fn read(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs_err::read(file).ok()?;
    let (hash, cubin) = bytes.split_at_checked(blake3::OUT_LEN)?;
    (blake3::hash(cubin).as_bytes() == hash).then(|| cubin.to_vec())
}

/// Other processes see the whole file or none.
fn write(folder: &Path, file: &Path, cubin: &[u8]) -> std::io::Result<()> {
    fs_err::create_dir_all(folder)?;
    let mut unfinished = tempfile::NamedTempFile::new_in(folder)?;
    unfinished.write_all(blake3::hash(cubin).as_bytes())?;
    unfinished.write_all(cubin)?;
    unfinished.persist(file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_cached_file_is_no_file() {
        let folder = specforge_testkit::tempdir();
        let file = folder.path().join("k.cubin");
        write(folder.path(), &file, b"machine code").unwrap();
        assert_eq!(read(&file).as_deref(), Some(&b"machine code"[..]));
        for damaged in [&b""[..], b"short", &std::fs::read(&file).unwrap()[..40]] {
            std::fs::write(&file, damaged).unwrap();
            assert_eq!(read(&file), None, "{} bytes", damaged.len());
        }
        write(folder.path(), &file, b"again").unwrap();
        assert_eq!(read(&file).as_deref(), Some(&b"again"[..]));
    }

    #[test]
    fn hopper_gets_its_own_instructions() {
        assert_eq!(Architecture::of((9, 0)).name(), "sm_90a");
        assert_eq!(Architecture::of((8, 6)).name(), "sm_86");
        assert!(Architecture::of((9, 0)).is_hopper() && !Architecture::of((10, 0)).is_hopper());
    }
}
