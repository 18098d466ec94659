//! Archives and recipes with real machines. The images are of busybox alone: no init, no agent, nothing of Debian.

use crate::archives::{Tar, docker_save};
use crate::lab::Lab;

fn busybox() -> Vec<u8> {
    std::fs::read("/bin/busybox").expect("busybox-static is installed: .ci/install")
}

/// A container image with a shell and little else.
fn container() -> Vec<u8> {
    let low = Tar::new()
        .dir("etc/", 0o755)
        .file("bin/busybox", 0o755, busybox())
        .hard("bin/sh", "bin/busybox")
        .hard("bin/cat", "bin/busybox")
        .hard("bin/mkdir", "bin/busybox")
        .hard("bin/ls", "bin/busybox")
        .file("etc/gone", 0o644, "gone")
        .finish();
    let high = Tar::new().file("etc/.wh.gone", 0o644, "").file("etc/greeting", 0o644, "hello\n").finish();
    docker_save(&[low, high], serde_json::json!({ "Env": ["FLAVOUR=vanilla"], "WorkingDir": "/srv" }))
}

#[test]
fn a_container_image_boots_and_recipes_go_on_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.toml");
    std::fs::write(&config, "guest_env = { PROXY = 'none' }\n").unwrap();
    let lab = Lab::real(&["--config", config.to_str().unwrap()]);
    let archive = lab.write("image.tar", container());
    let archive = archive.to_str().unwrap();
    let made = lab.json(&["template", "import", archive, "--name", "box", "--disk", "64mb"]);
    assert_eq!((made["workdir"].as_str(), made["env"]["FLAVOUR"].as_str()), (Some("/srv"), Some("vanilla")));
    let recipe = lab.write(
        "recipe.toml",
        r##"
        from = "box"
        memory = "256mb"
        workdir = "/made/here"
        run = ["cat /etc/greeting > copy; echo $FLAVOUR >> copy", "ls /etc/gone && exit 1; echo ok"]
        [[files]]
        path = "/opt/tool"
        content = "#!/bin/sh\necho tool $PROXY\n"
        mode = "755"
        "##,
    );
    lab.json(&["template", "build", "mine", "--file", recipe.to_str().unwrap()]);
    // What a build wrote is there after it, in a sandbox without a network, and in its forks.
    let sandbox =
        lab.json(&["sandbox", "create", "--template", "mine", "--name", "s", "--network-policy", "deny-all", "--wait"]);
    assert_eq!(sandbox["network_policy"], "deny-all");
    assert_eq!(lab.exec("s", &["cat", "copy"]), "hello\nvanilla\n");
    assert_eq!(lab.exec("s", &["/opt/tool"]), "tool none\n");
    assert_eq!(lab.exec("s", &["ls", "/sys/class/net"]), "lo\n");
    lab.json(&["sandbox", "fork", "s", "--name", "child"]);
    assert_eq!(lab.json(&["sandbox", "show", "child"])["network_policy"], "deny-all");
    assert_eq!(lab.exec("child", &["ls", "/sys/class/net"]), "lo\n");
    lab.json(&["sandbox", "create", "--template", "box", "--name", "open", "--wait"]);
    assert_eq!(lab.exec("open", &["ls", "/sys/class/net"]), "eth0\nlo\n");
}

#[test]
fn an_image_without_a_shell_boots_and_trusts_the_hosts_certificates() {
    let certificate = "-----BEGIN CERTIFICATE-----\nnot a real one\n-----END CERTIFICATE-----\n";
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("ca.pem");
    std::fs::write(&bundle, certificate).unwrap();
    let lab = Lab::real(&["--ca-bundle", bundle.to_str().unwrap()]);
    // One program and a certificate of its own; no /etc/passwd, no /bin/sh, no /dev, no /tmp.
    let own = "etc/ssl/certs/ca-certificates.crt";
    let tar = Tar::new().file("busybox", 0o755, busybox()).file(own, 0o644, "its own\n").finish();
    let archive = lab.write("distroless.tar", tar);
    lab.json(&["template", "import", archive.to_str().unwrap(), "--name", "bare", "--disk", "64mb"]);
    lab.json(&["sandbox", "create", "--template", "bare", "--name", "s", "--wait"]);
    assert_eq!(lab.exec("s", &["/busybox", "cat", "/run/miosa/ca-bundle.pem"]), format!("{certificate}\nits own\n"));
    let env = lab.exec("s", &["/busybox", "env"]);
    for name in ["SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE"] {
        assert!(env.contains(&format!("{name}=/run/miosa/ca-bundle.pem\n")), "{env}");
    }
    let ran = lab.run(&["sandbox", "exec", "s", "--", "sh"]);
    assert_eq!(ran.code, 127, "{ran:?}");
    // Nothing of the host's is on the disk: what the guest has in memory is gone with it.
    assert!(lab.exec("s", &["/busybox", "df", "/run/miosa"]).contains("tmpfs"));
}
