//! Images in and out.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use crate::support::{miosa, run};
use crate::words::{Place, noise, text};

#[test]
fn what_goes_in_comes_out() {
    for place in Place::both() {
        let mut image = noise(1, 3 << 20);
        image[1 << 20..2 << 20].fill(0);
        let made = place.import("golden", &image);
        assert_eq!((&made["size_bytes"], &made["logical_bytes"]), (&(3 << 20).into(), &(2 << 20).into()), "{made}");
        assert_eq!((&made["padded_bytes"], &made["state"]), (&0.into(), &"ready".into()));
        assert!(place.export("golden") == image);
        // Sealed, and through pipes, the same.
        place.ok(&["store", "seal", "--wait"]);
        let id = made["id"].as_str().unwrap();
        let piped = miosa(place.dir(), &["disk", "export", id, "-"]).output().unwrap();
        assert!(piped.status.success() && piped.stdout == image, "{:?}", piped.status);
        let again = run(miosa(place.dir(), &["disk", "import", "-", "--name", "piped", "--json"]), &image).json();
        assert_eq!(again["size_bytes"], 3 << 20);
        assert!(place.export("piped") == image);
    }
}

#[test]
fn holes_stay_holes() {
    for place in Place::both() {
        let path = place.file("sparse");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(20 << 30).unwrap();
        file.write_all_at(&noise(2, 10_000), (7 << 30) + 5_000).unwrap();
        let made = place.ok(&["disk", "import", text(&path), "--name", "sparse"]);
        assert_eq!(made["size_bytes"], 20_u64 << 30);
        assert!(made["logical_bytes"].as_u64().unwrap() <= 16_384, "{made}");
        let out = place.file("out");
        let told = place.ok(&["disk", "export", "sparse", text(&out)]);
        assert!(told["data_bytes"].as_u64().unwrap() <= 16_384, "{told}");
        let meta = std::fs::metadata(&out).unwrap();
        assert_eq!(meta.len(), 20 << 30);
        assert!(meta.blocks() * 512 < 1 << 20, "{} bytes are allocated", meta.blocks() * 512);
        let mut content = vec![0; 10_000];
        std::fs::File::open(&out).unwrap().read_exact_at(&mut content, (7 << 30) + 5_000).unwrap();
        assert!(content == noise(2, 10_000));
        // What exports made for themselves is gone.
        assert_eq!(place.names(), ["sparse"]);
        assert!(place.ok(&["disk", "snapshots", "sparse"]).as_array().unwrap().is_empty());
    }
}

#[test]
fn a_size_that_is_no_multiple_is_padded_and_that_is_said() {
    let place = Place::Alone(tempfile::tempdir().unwrap());
    let image = noise(3, 10_000);
    let made = place.import("odd", &image);
    assert_eq!((&made["size_bytes"], &made["padded_bytes"]), (&12_288.into(), &2_288.into()));
    let back = place.export("odd");
    assert!(back[..10_000] == image && back[10_000..].iter().all(|b| *b == 0) && back.len() == 12_288);
    let said = place.run(&["disk", "import", text(&place.file("to-import")), "--name", "odd-2"]);
    assert!(said.err.contains("no multiple of 4096"), "{said:?}");
}

#[test]
fn an_image_of_qemus_is_converted_when_it_is_named_so() {
    let place = Place::Alone(tempfile::tempdir().unwrap());
    let image = noise(4, 1 << 20);
    let (raw, qcow2) = (place.file("raw"), place.file("qcow2"));
    std::fs::write(&raw, &image).unwrap();
    let qemu_img = |args: &[&str]| assert!(Command::new("qemu-img").args(args).output().unwrap().status.success());
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&qcow2)]);
    place.ok(&["disk", "import", text(&qcow2), "--name", "converted", "--format", "qcow2"]);
    assert!(place.export("converted") == image);
    // Nothing is guessed: as raw it is what it is.
    let as_raw = place.ok(&["disk", "import", text(&qcow2), "--name", "as-it-is"]);
    assert_ne!(as_raw["size_bytes"], 1 << 20);
    place.refused(&["disk", "import", text(&raw), "--name", "x", "--format", "qcow2"], 1, "invalid_image");
    // One that would have other files read with it.
    let overlay = place.file("overlay");
    qemu_img(&["create", "-f", "qcow2", "-b", text(&raw), "-F", "raw", text(&overlay)]);
    let error =
        place.refused(&["disk", "import", text(&overlay), "--name", "x", "--format", "qcow2"], 1, "invalid_image");
    assert!(error["message"].as_str().unwrap().contains("needs another file"), "{error}");
    assert_eq!(place.names(), ["converted", "as-it-is"]);
}

#[test]
fn what_is_no_image_is_refused_and_leaves_nothing() {
    for place in Place::both() {
        place.ok(&["disk", "create", "taken", "--size", "1mb"]);
        let (empty, good) = (place.file("empty"), place.file("good"));
        std::fs::write(&empty, b"").unwrap();
        std::fs::write(&good, noise(5, 8_192)).unwrap();
        let import = |file: &str, name: &str, code: &str| {
            let error = place.refused(&["disk", "import", file, "--name", name], 1, code);
            assert!(error["hint"].as_str().is_some_and(|h| !h.is_empty()), "{error}");
        };
        import("/no/such/image", "x", "local_file");
        import("/", "x", "local_file");
        import("/dev/null", "x", "local_file");
        import(text(&empty), "x", "invalid_input");
        import(text(&good), "taken", "name_taken");
        import(text(&good), "disk-7", "invalid_input");
        import(text(&good), "no/slash", "invalid_input");
        let nothing = run(miosa(place.dir(), &["disk", "import", "-", "--name", "x", "--json"]), b"").error(1);
        assert_eq!(nothing["code"], "invalid_input");
        place.refused(&["disk", "export", "nobody", text(&place.file("out"))], 1, "disk_not_found");
        place.refused(&["disk", "export", "taken", "/no/such/dir/out"], 1, "local_file");
        place.refused(&["disk", "export", "taken", "-"], 1, "usage");
        // A target that is full keeps nothing half written.
        place.refused(&["disk", "export", "taken", "/dev/full"], 1, "local_file");
        assert_eq!(place.names(), ["taken"]);
        assert!(!place.file("out").exists());
    }
}

#[test]
fn an_import_that_is_cut_off_leaves_no_disk() {
    for place in Place::both() {
        place.ok(&["disk", "create", "other", "--size", "1mb"]);
        let path = place.file("large");
        let file = std::fs::File::create(&path).unwrap();
        // Enough to be met in the middle.
        for i in 0..512 {
            file.write_all_at(&noise(i, 1 << 20), i << 20).unwrap();
        }
        let mut patience = std::time::Duration::from_millis(400);
        loop {
            let mut child = miosa(place.dir(), &["disk", "import", text(&path), "--name", "cut"]).spawn().unwrap();
            std::thread::sleep(patience);
            child.kill().unwrap();
            let done = child.wait().unwrap().success();
            // The daemon sees the end of the connection soon; a store that nobody holds is put right when it is opened.
            let began = std::time::Instant::now();
            while !done && place.names() != ["other"] && began.elapsed().as_secs() < 20 {
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            if place.names() == ["other"] {
                break;
            }
            // It was done before it could be met, if only just, and is whole then. That is not what is asked for.
            assert!(place.export("cut") == std::fs::read(&path).unwrap(), "a part of it is there");
            place.ok(&["disk", "delete", "cut"]);
            patience /= 2;
        }
        // The name is free.
        place.import("cut", &noise(6, 4_096));
    }
}
