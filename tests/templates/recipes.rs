//! Recipes, with machines that run the host's own programs and keep no disk.

use crate::lab::Lab;

fn recipe(lab: &Lab, text: &str) -> String {
    lab.write("recipe.toml", text).to_str().unwrap().to_owned()
}

#[test]
fn a_recipe_becomes_a_template_that_sandboxes_start_from() {
    let lab = Lab::fake();
    lab.write("beside.txt", "from beside");
    let file = recipe(
        &lab,
        r#"
        from = "base"
        cpus = 2
        memory = "512mb"
        run = ["echo one; pwd", { command = "echo $GREETING", env = { GREETING = "hello" } }]
        [env]
        COLOUR = "red"
        [[files]]
        path = "/etc/beside"
        source = "beside.txt"
        mode = "600"
        "#,
    );
    let built = lab.run(&["template", "build", "mine", "--file", &file]);
    assert_eq!(built.code, 0, "{built:?}");
    // What commands say is told as it comes, and not on stdout.
    assert!(built.err.contains("step 3 of 3") && built.err.contains("hello"), "{built:?}");
    assert!(!built.out.contains("hello"), "{built:?}");

    let shown = lab.json(&["template", "show", "mine"]);
    assert_eq!((shown["from"].as_str(), shown["cpu_count"].as_u64()), (Some("base"), Some(2)));
    assert!(shown["exclusive_bytes"].is_u64() && shown["referenced_bytes"].is_u64(), "{shown}");
    let sandbox = lab.json(&["sandbox", "create", "--template", "mine", "--name", "s", "--wait"]);
    assert_eq!((sandbox["cpu_count"].as_u64(), sandbox["memory_mb"].as_u64()), (Some(2), Some(512)));
    assert_eq!(lab.exec("s", &["sh", "-c", "echo $COLOUR"]), "red\n");
    assert_eq!(lab.json(&["template", "show", "mine"])["sandbox_count"], 1);
    // The build's own sandbox is gone.
    assert_eq!(lab.left(), (1, 1));

    // Deleted under it: it goes on.
    assert_eq!(lab.json(&["template", "delete", "mine"])["sandbox_count"], 1);
    assert_eq!(lab.exec("s", &["sh", "-c", "echo $COLOUR"]), "red\n");
    // Of the template and its steps nothing is left but `base`.
    assert_eq!(lab.snapshots(), 1);
}

#[test]
fn steps_that_were_done_before_are_not_done_again() {
    let lab = Lab::fake();
    let mark = lab.dir.path().join("mark");
    let text = |last: &str| format!("from = \"base\"\nrun = [\"echo x >> {}\", \"{last}\"]\n", mark.display());
    let count = || std::fs::read_to_string(&mark).unwrap().lines().count();
    let build = |text: &str, more: &[&str]| {
        let file = recipe(&lab, text);
        let ran = lab.run(&[&["template", "build", "mine", "--file", &file], more].concat());
        assert_eq!(ran.code, 0, "{ran:?}");
        ran.err
    };
    build(&text("echo first"), &[]);
    assert!(build(&text("echo second"), &[]).contains("step 1 of 2: run echo x >> "), "told all the same");
    assert_eq!(count(), 1, "only the last step is another");
    assert!(build(&text("echo second"), &[]).contains("(done before)"));
    assert_eq!(count(), 1);
    build(&text("echo second"), &["--no-cache"]);
    assert_eq!(count(), 2);
    // States of steps that are of no use any more are given up: base, two steps, the template.
    assert_eq!(lab.snapshots(), 4);
    // Another beginning is another build.
    let image = lab.write("other.raw", vec![2; 64 * 4096]);
    lab.json(&["template", "import", image.to_str().unwrap(), "--name", "base"]);
    build(&text("echo second"), &[]);
    assert_eq!(count(), 3);
    assert_eq!(lab.left(), (0, 0));
}

#[test]
fn a_build_that_does_nothing_new_leaves_the_template_as_it_is() {
    let lab = Lab::fake();
    let text = "from = \"base\"\nmemory = \"512mb\"\nrun = [\"echo x\"]\n";
    let build = |text: &str, more: &[&str]| {
        let file = recipe(&lab, text);
        lab.json(&[&["template", "build", "mine", "--file", &file], more].concat())["created_at"].clone()
    };
    let first = build(text, &[]);
    assert_eq!(build(text, &[]), first);
    // Another memory, or steps done anew, make another one.
    let second = build(&text.replace("512", "640"), &[]);
    assert_ne!(second, first);
    assert_ne!(build(&text.replace("512", "640"), &["--no-cache"]), second);
    assert_eq!(lab.json(&["template", "show", "mine"])["memory_mb"], 640);
    assert_eq!(lab.snapshots(), 3);
}

#[test]
fn a_recipe_can_enlarge_the_disk() {
    let lab = Lab::fake();
    // With steps, all of them done before, and without any.
    for (name, steps) in [("one", "run = [\"true\"]\n"), ("again", "run = [\"true\"]\n"), ("none", "")] {
        let file = recipe(&lab, &format!("from = \"base\"\ndisk = \"1gb\"\n{steps}"));
        let built = lab.json(&["template", "build", name, "--file", &file]);
        assert_eq!(built["disk_size_mb"], 1_024, "{built}");
        let made = lab.json(&["sandbox", "create", "--template", name, "--name", &format!("of-{name}"), "--no-start"]);
        assert_eq!(made["disk_size_mb"], 1_024, "{made}");
    }
    let same = recipe(&lab, "from = \"one\"\nrun = [\"echo more\"]\n");
    assert_eq!(lab.json(&["template", "build", "two", "--file", &same])["disk_size_mb"], 1_024);
    let larger = recipe(&lab, "from = \"one\"\ndisk = \"2gb\"\n");
    assert_eq!(lab.json(&["template", "build", "large", "--file", &larger])["disk_size_mb"], 2_048);
    let smaller = recipe(&lab, "from = \"large\"\ndisk = \"1gb\"\n");
    let message = lab.error(1, &["template", "build", "small", "--file", &smaller]);
    assert!(message.contains("1024 MiB") && message.contains("2048 MiB"), "{message}");
}

#[test]
fn deleting_a_template_gives_back_what_was_told() {
    let lab = Lab::fake();
    // Content of its own, which no other template has.
    let noise: Vec<u8> =
        (0..256 * 1_024_u32).flat_map(|n| blake3::hash(&n.to_le_bytes()).as_bytes()[..8].to_vec()).collect();
    let image = lab.write("noise.raw", &noise);
    lab.json(&["template", "import", image.to_str().unwrap(), "--name", "noise"]);
    let file = recipe(&lab, "from = \"noise\"\nrun = [\"true\"]\n");
    lab.json(&["template", "build", "mine", "--file", &file]);
    let cost = |name: &str| lab.json(&["template", "show", name])["exclusive_bytes"].as_u64().unwrap();
    // Both have it, so neither alone gives it back.
    assert!(cost("noise") < 100_000 && cost("mine") < 100_000);
    lab.json(&["template", "delete", "noise"]);
    // The state of the step has it too, and goes with its template.
    let told = cost("mine");
    assert!((2 << 20..3 << 20).contains(&told), "{told}");
    lab.json(&["template", "delete", "mine"]);
    let freed = lab.json(&["store", "gc"])["bytes_freed"].as_u64().unwrap();
    assert!(freed * 100 >= told * 95, "{freed} of {told} bytes");
}

#[test]
fn a_failing_step_is_named_and_leaves_nothing() {
    let lab = Lab::fake();
    let file = recipe(&lab, "from = \"base\"\nrun = [\"echo fine\", \"echo the last words; exit 3\"]\n");
    let message = lab.error(1, &["template", "build", "mine", "--file", &file]);
    for words in ["step 2 of 2", "exit code 3", "the last words"] {
        assert!(message.contains(words), "{message}");
    }
    assert_eq!(lab.left(), (0, 0));
    assert_eq!(lab.json(&["template", "show", "mine"])["status"], "failed");
    let slow = recipe(&lab, "from = \"base\"\nrun = [{ command = \"sleep 600\", timeout = \"1s\" }]\n");
    assert!(lab.error(1, &["template", "build", "mine", "--file", &slow]).contains("longer than 1 s"));
    assert_eq!(lab.left(), (0, 0));
}

#[test]
fn mistakes_are_told_before_anything_is_done() {
    let lab = Lab::fake();
    for (text, words) in [
        ("from = \"base\"\nrum = []\n", "rum"),
        ("from = \"nowhere\"\nrun = [\"true\"]\n", "nowhere"),
        ("from = \"base\"\n[[files]]\npath = \"/x\"\nsource = \"absent\"\n", "absent"),
        ("from = \"base\"\npackages = [\"-o\"]\n", "-o"),
        ("from = \"mine\"\n", "itself"),
        ("not toml", "recipe"),
    ] {
        let file = recipe(&lab, text);
        let message = lab.error(1, &["template", "build", "mine", "--file", &file]);
        assert!(message.contains(words), "{text}: {message}");
    }
    assert!(lab.error(1, &["template", "build", "mine", "--file", "/nonexistent"]).contains("/nonexistent"));
    assert!(lab.error(1, &["template", "build", "unheard-of"]).contains("unheard-of"));
    assert!(lab.error(1, &["template", "import", "/nonexistent", "--name", "x"]).contains("/nonexistent"));
    assert!(lab.error(1, &["sandbox", "create", "--network-policy", "some"]).contains("some"));
    assert_eq!(lab.left(), (0, 0));
    assert_eq!(lab.snapshots(), 1);
}
