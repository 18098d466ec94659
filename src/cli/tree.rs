//! `miosa sandbox snapshots tree`: what came from what, as a tree.

use std::collections::HashMap;

use super::output::{Out, Result};
use super::sandbox::{age, path};
use crate::api::client::Client;
use crate::engine::{LineageNode, NodeKind};
use crate::units::show_bytes;

pub(super) async fn run(client: &Client, out: Out, sandbox: Option<String>) -> Result<()> {
    let route = sandbox.map_or("/snapshots/tree?sizes=true".to_owned(), |s| path(&s, "/snapshots/tree?sizes=true"));
    let nodes: Vec<LineageNode> = client.get(&route).await?;
    let ids: Vec<_> = nodes.iter().map(|n| n.id.as_str()).collect();
    out.answer(&nodes, &ids.join("\n"), |out| {
        if nodes.is_empty() {
            return format!("nothing yet\n{}", out.next_step("miosa template build base"));
        }
        let mut text = draw(&nodes, &|n| label(out, n));
        text.push_str("\nsizes are what nothing else has: about what deleting it alone gives back");
        text
    })
}

fn label(out: &Out, node: &LineageNode) -> String {
    let name = node.name.as_deref().filter(|name| *name != node.id);
    let mut parts = vec![match (node.kind, name) {
        (NodeKind::Template, _) => format!("template {}", out.strong(&node.id)),
        (_, None) => node.id.clone(),
        (NodeKind::Sandbox, Some(name)) => format!("{} {}", node.id, out.strong(name)),
        (NodeKind::Snapshot, Some(name)) => format!("{} {}", node.id, out.strong(&format!("“{name}”"))),
    }];
    if node.state != "ready" {
        parts.push(node.state.clone());
    }
    if let Some(bytes) = node.exclusive_bytes {
        parts.push(show_bytes(bytes + node.unsealed_bytes.unwrap_or_default()));
    }
    parts.extend(node.created_at.map(age));
    parts.join(" · ")
}

/// One line a node, below its parent, in the order given.
fn draw(nodes: &[LineageNode], label: &dyn Fn(&LineageNode) -> String) -> String {
    let known: HashMap<&str, usize> = nodes.iter().enumerate().map(|(i, n)| (n.id.as_str(), i)).collect();
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    let mut roots = Vec::new();
    for (i, node) in nodes.iter().enumerate() {
        match node.parent.as_deref().and_then(|p| known.get(p)) {
            Some(parent) => children[*parent].push(i),
            None => roots.push(i),
        }
    }
    let mut lines = Vec::new();
    // Depth first, without recursion: a lineage can be thousands deep.
    let mut open: Vec<(usize, String, Option<bool>)> =
        roots.into_iter().rev().map(|i| (i, String::new(), None)).collect();
    while let Some((i, indent, last)) = open.pop() {
        let (branch, below) = match last {
            None => ("", ""),
            Some(false) => ("├─ ", "│  "),
            Some(true) => ("└─ ", "   "),
        };
        lines.push(format!("{indent}{branch}{}", label(&nodes[i])));
        let below = format!("{indent}{below}");
        let count = children[i].len();
        open.extend(children[i].iter().enumerate().rev().map(|(at, c)| (*c, below.clone(), Some(at + 1 == count))));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str, parent: Option<&str>) -> LineageNode {
        LineageNode {
            kind: NodeKind::Sandbox,
            id: id.to_owned(),
            name: None,
            parent: parent.map(str::to_owned),
            state: "ready".to_owned(),
            created_at: None,
            exclusive_bytes: None,
            unsealed_bytes: None,
        }
    }

    #[test]
    fn children_stand_below_their_parents() {
        let nodes = [
            node("base", None),
            node("a", Some("base")),
            node("s", Some("a")),
            node("b", Some("base")),
            node("t", Some("s")),
            node("f", Some("a")),
            node("lone", None),
        ];
        let drawn = draw(&nodes, &|n| n.id.clone());
        assert_eq!(drawn, "base\n├─ a\n│  ├─ s\n│  │  └─ t\n│  └─ f\n└─ b\nlone");
    }
}
