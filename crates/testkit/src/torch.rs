//! Files as `torch.save` writes them, for tests that need more than the stored ones.

use std::io::Write;
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// One tensor: name, class of its storage (`BFloat16Storage`), shape, elements.
pub type TorchEntry<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>);

/// A file that holds a dictionary of tensors.
pub fn torch_file(path: &Path, tensors: &[TorchEntry<'_>]) {
    let mut pickle = b"\x80\x02}(".to_vec();
    for (index, (name, storage, shape, bytes)) in tensors.iter().enumerate() {
        text(&mut pickle, name);
        let elements = shape.iter().product::<usize>().max(1);
        let size = bytes.len() / elements;
        assert_eq!(size * elements, bytes.len().max(size), "{name}: {shape:?} of {} bytes", bytes.len());
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut pickle, "storage");
        pickle.extend(format!("ctorch\n{storage}\n").bytes());
        text(&mut pickle, &index.to_string());
        text(&mut pickle, "cpu");
        integer(&mut pickle, elements);
        pickle.extend(b"tQK\x00(");
        shape.iter().for_each(|&extent| integer(&mut pickle, extent));
        pickle.extend(b"t(");
        (0..shape.len()).for_each(|axis| integer(&mut pickle, shape[axis + 1..].iter().product()));
        pickle.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
    }
    pickle.extend(b"u.");
    let mut entries = vec![("data.pkl".to_owned(), pickle), ("byteorder".to_owned(), b"little".to_vec())];
    entries.extend(tensors.iter().enumerate().map(|(i, (.., bytes))| (format!("data/{i}"), bytes.clone())));
    torch_archive(path, &entries);
}

/// An archive of these entries, whatever they hold.
pub fn torch_archive(path: &Path, entries: &[(String, Vec<u8>)]) {
    let file = fs_err::File::create(path).unwrap_or_else(|error| panic!("{error}"));
    let mut zip = ZipWriter::new(file);
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut write = || -> zip::result::ZipResult<()> {
        for (name, content) in entries {
            zip.start_file(format!("archive/{name}"), stored)?;
            zip.write_all(content)?;
        }
        Ok(())
    };
    write().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    zip.finish().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn text(pickle: &mut Vec<u8>, text: &str) {
    pickle.push(b'X');
    pickle.extend((text.len() as u32).to_le_bytes());
    pickle.extend(text.bytes());
}

fn integer(pickle: &mut Vec<u8>, number: usize) {
    pickle.push(b'J');
    pickle.extend((number as i32).to_le_bytes());
}
