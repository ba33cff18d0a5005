//! As much of JSON Schema as our schemas use: type, enum, required, properties, items, anyOf, bounds, and references into
//! the same document. A keyword that is not known here is an error, so that no rule is believed to be checked.
#![allow(clippy::panic, reason = "a harness fails tests")]

use serde_json::Value;

/// Everything in `value` that is not as `schema` says, as sentences.
pub fn violations(schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(schema, schema, value, "", &mut found);
    found
}

/// The schema that a reference leads to, or the schema itself.
pub fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(reference) => {
            let pointer = reference
                .strip_prefix('#')
                .unwrap_or_else(|| panic!("{reference} is elsewhere"));
            let target = root
                .pointer(pointer)
                .unwrap_or_else(|| panic!("there is no {reference}"));
            resolve(root, target)
        }
        None => schema,
    }
}

fn check(root: &Value, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let schema = resolve(root, schema);
    let rules = schema
        .as_object()
        .unwrap_or_else(|| panic!("the schema of {at:?} is no object"));
    for (keyword, rule) in rules {
        let holds = match keyword.as_str() {
            "$schema" | "$defs" | "$ref" | "title" | "description" => true,
            "type" => match rule {
                Value::Array(types) => types.iter().any(|one| is(one, value)),
                one => is(one, value),
            },
            "enum" => rule.as_array().is_some_and(|values| values.contains(value)),
            "minimum" => value.as_f64().is_none_or(|number| number >= bound(rule)),
            "maximum" => value.as_f64().is_none_or(|number| number <= bound(rule)),
            "minItems" => value
                .as_array()
                .is_none_or(|items| items.len() as f64 >= bound(rule)),
            "maxItems" => value
                .as_array()
                .is_none_or(|items| items.len() as f64 <= bound(rule)),
            "required" => {
                for name in rule.as_array().into_iter().flatten().filter_map(Value::as_str) {
                    if value.is_object() && value.get(name).is_none() {
                        found.push(format!("{at}/{name} is missing"));
                    }
                }
                true
            }
            "properties" => {
                for (name, schema) in rule.as_object().into_iter().flatten() {
                    if let Some(value) = value.get(name) {
                        check(root, schema, value, &format!("{at}/{name}"), found);
                    }
                }
                true
            }
            "items" => {
                for (number, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(root, rule, item, &format!("{at}/{number}"), found);
                }
                true
            }
            "anyOf" => rule.as_array().into_iter().flatten().any(|one| {
                let mut tried = Vec::new();
                check(root, one, value, at, &mut tried);
                tried.is_empty()
            }),
            other => panic!("the keyword {other} is not checked here"),
        };
        if !holds {
            found.push(format!("{at} breaks {keyword} {rule}: {value}"));
        }
    }
}

fn bound(rule: &Value) -> f64 {
    rule.as_f64().unwrap_or_else(|| panic!("{rule} is no bound"))
}

fn is(name: &Value, value: &Value) -> bool {
    match name.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_u64() || value.is_i64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        _ => panic!("{name} is no type"),
    }
}

/// Every field that `value` has and the schema does not know, and every field that the schema knows and `value` has not.
/// For a value that has everything, both must be none.
pub fn unknown_and_absent(schema: &Value, value: &Value) -> (Vec<String>, Vec<String>) {
    let (mut unknown, mut absent) = (Vec::new(), Vec::new());
    compare(schema, schema, value, "", &mut unknown, &mut absent);
    (unknown, absent)
}

fn compare(
    root: &Value,
    schema: &Value,
    value: &Value,
    at: &str,
    unknown: &mut Vec<String>,
    absent: &mut Vec<String>,
) {
    let mut schema = resolve(root, schema);
    // What may be null is described by the other choice.
    if let Some(choices) = schema["anyOf"].as_array() {
        let other = choices.iter().find(|choice| choice["type"] != "null");
        schema = resolve(root, other.unwrap_or_else(|| panic!("{at} is never anything")));
    }
    match value {
        Value::Object(fields) => {
            let known = schema["properties"].as_object();
            for (name, value) in fields {
                match known.and_then(|known| known.get(name)) {
                    Some(schema) => compare(root, schema, value, &format!("{at}/{name}"), unknown, absent),
                    None => unknown.push(format!("{at}/{name}")),
                }
            }
            for name in known.into_iter().flatten().map(|(name, _)| name) {
                if !fields.contains_key(name) {
                    absent.push(format!("{at}/{name}"));
                }
            }
        }
        Value::Array(items) => {
            for item in items {
                compare(root, &schema["items"], item, &format!("{at}/*"), unknown, absent);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_breaks_a_rule_is_found() {
        let schema = json!({
            "type": "object",
            "required": ["a"],
            "properties": {
                "a": {"$ref": "#/$defs/small"},
                "b": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "c": {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1}
            },
            "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 9}}
        });
        assert_eq!(
            violations(&schema, &json!({"a": 3, "b": null, "c": ["x"], "new": 1})),
            [""; 0]
        );
        for bad in [
            json!({}),
            json!({"a": 10}),
            json!({"a": -1}),
            json!({"a": "3"}),
            json!({"a": 1.5}),
            json!({"a": 1, "b": 2}),
            json!({"a": 1, "c": []}),
            json!({"a": 1, "c": ["z"]}),
            json!([]),
        ] {
            assert!(!violations(&schema, &bad).is_empty(), "{bad}");
        }
        let (unknown, absent) = unknown_and_absent(&schema, &json!({"a": 3, "b": "s", "d": 1}));
        assert_eq!((unknown, absent), (vec!["/d".to_owned()], vec!["/c".to_owned()]));
    }
}
