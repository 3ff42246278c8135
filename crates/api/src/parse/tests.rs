use super::any_json::any_json;
use super::*;
use crate::openapi::routes::{ROUTES, Route, When};
use proptest::prelude::*;
use serde_json::json;

fn path(route: &Route) -> String {
    route.path.replace("{id}", "x")
}

fn parsed(route: &Route, body: &Value) -> Result<Parsed, Refused> {
    parse(route.method, &path(route), body.to_string().as_bytes())
}

/// Routes that take a body, with the body that they take.
fn with_body() -> impl Iterator<Item = (&'static Route, Value)> {
    ROUTES
        .iter()
        .filter(|route| !route.example.is_empty())
        .map(|route| (route, serde_json::from_str(route.example).unwrap()))
}

#[test]
fn every_path_takes_its_example() {
    for route in ROUTES {
        let result = parse(route.method, &path(route), route.example.as_bytes());
        match (route.when, route.path) {
            (When::Never, _) => assert!(matches!(result, Err(Refused::Unsupported(_)))),
            _ => drop(result.unwrap_or_else(|e| panic!("{} {}: {e}", route.method, route.path))),
        }
    }
}

#[test]
fn a_field_that_nobody_knows_is_refused() {
    for (route, mut body) in with_body() {
        // Metadata is any object; and what is not there yet is refused anyway.
        if route.path == "/mmds" || route.when == When::Never {
            continue;
        }
        body["nosuch"] = json!(1);
        let error = parsed(route, &body).unwrap_err().to_string();
        assert!(error.contains("nosuch"), "{}: {error}", route.path);
    }
}

#[test]
fn a_field_of_the_wrong_kind_is_refused() {
    for (route, body) in with_body() {
        if route.path == "/mmds" || route.when == When::Never {
            continue;
        }
        for field in body.as_object().unwrap().keys() {
            for wrong in [json!({"a": 1}), json!([[1]]), json!(-1), json!(1.5)] {
                let mut body = body.clone();
                body[field] = wrong;
                let result = parsed(route, &body);
                assert!(result.is_err(), "{} {field}: {body}", route.path);
            }
        }
    }
}

/// Fields that must be there; with any other missing the request is understood.
fn required(route: &Route) -> &'static [&'static str] {
    match (route.method, route.path) {
        (_, "/actions" | "/husk/actions") => &["action_type"],
        (_, "/boot-source") => &["kernel_image_path"],
        ("PUT", "/machine-config") => &["vcpu_count", "mem_size_mib"],
        ("PUT", "/drives/{id}") => &["drive_id", "is_root_device"],
        ("PATCH", "/drives/{id}") => &["drive_id"],
        (_, "/network-interfaces/{id}") => &["iface_id"],
        (_, "/vsock") => &["guest_cid", "uds_path"],
        (_, "/snapshot/create") => &["snapshot_path", "mem_file_path"],
        (_, "/snapshot/load") => &["snapshot_path"],
        ("PUT", "/balloon") => &["amount_mib", "deflate_on_oom"],
        ("PATCH", "/balloon") => &["amount_mib"],
        (_, "/balloon/statistics") => &["stats_polling_interval_s"],
        (_, "/mmds/config") => &["network_interfaces"],
        (_, "/metrics") => &["metrics_path"],
        (_, "/vm") => &["state"],
        _ => &[],
    }
}

#[test]
fn exactly_the_required_fields_must_be_there() {
    for (route, body) in with_body().filter(|(route, _)| route.when != When::Never) {
        for field in body.as_object().unwrap().keys() {
            let mut less = body.clone();
            less.as_object_mut().unwrap().remove(field);
            let wanted = !required(route).contains(&field.as_str());
            let result = parsed(route, &less);
            assert_eq!(
                result.is_ok(),
                wanted,
                "{} without {field}: {result:?}",
                route.path
            );
            if let Err(e) = result {
                assert!(e.to_string().contains(field), "{e}");
            }
        }
    }
}

#[test]
fn bodies_belong_where_they_belong() {
    for (route, _) in with_body() {
        if route.path == "/balloon/hinting/start" {
            continue;
        }
        let empty = parse(route.method, &path(route), b"");
        assert!(matches!(empty, Err(Refused::NoBody(_))), "{}", route.path);
        for body in [
            "[]",
            "3",
            "null",
            "\"a\"",
            "{",
            "{}x",
            "\u{0}",
            "[1,2]",
            "\u{feff}{}",
        ] {
            let result = parse(route.method, &path(route), body.as_bytes());
            assert!(result.is_err(), "{} {body:?}", route.path);
        }
    }
    for route in ROUTES
        .iter()
        .filter(|route| route.method == "GET" || route.method == "DELETE")
    {
        let result = parse(route.method, &path(route), b"{}");
        assert!(result.is_err(), "{} {}", route.method, route.path);
    }
}

#[test]
fn methods_and_paths_that_are_not_there_are_named() {
    for (method, path) in [
        ("POST", "/actions"),
        ("HEAD", "/"),
        ("OPTIONS", "*"),
        ("get", "/"),
        ("GET", "/nosuch"),
        ("GET", "/actions"),
        ("PUT", "/"),
        ("PUT", "/vm/config"),
        ("PATCH", "/vsock"),
        ("DELETE", "/vsock"),
        ("PUT", "/drives/a/b"),
        ("PUT", "/../boot-source"),
    ] {
        let error = parse(method, path, b"{}").unwrap_err().to_string();
        let wanted = format!("Invalid request method and/or path: {method} {path}.");
        assert_eq!(error, wanted);
    }
}

#[test]
fn ids_are_plain_and_agree() {
    let body = br#"{"drive_id":"a","is_root_device":true}"#;
    let error = |path: &str| parse("PUT", path, body).unwrap_err().to_string();
    assert_eq!(error("/drives/"), "The ID cannot be empty.");
    assert_eq!(error("/drives"), "The ID cannot be empty.");
    assert!(error("/drives/a-b").contains("alphanumeric"));
    assert!(error("/drives/%61").contains("alphanumeric"));
    assert!(error("/drives/\u{e4}").contains("alphanumeric"));
    assert!(error("/drives/b").contains("does not match"));
    assert!(parse("DELETE", "/drives/a-b", b"").is_err());
    assert!(parse("PATCH", "/network-interfaces/b", br#"{"iface_id":"a"}"#).is_err());
}

#[test]
fn a_path_may_end_in_a_slash_and_have_a_query() {
    for path in [
        "/vm/config",
        "/vm/config/",
        "/vm/config?a=b",
        "/vm/config#x",
    ] {
        let call = parse("GET", path, b"").unwrap().call;
        assert_eq!(call, Call::Vmm(VmmRequest::Get(Query::Config)));
    }
}

#[test]
fn what_goes_away_is_said() {
    let deprecated = |method: &str, path: &str, body: &str| {
        let parsed = parse(method, path, body.as_bytes()).unwrap();
        parsed.deprecated.is_some()
    };
    let machine = r#"{"vcpu_count":1,"mem_size_mib":128}"#;
    let with_template = r#"{"vcpu_count":1,"mem_size_mib":128,"cpu_template":"T2"}"#;
    assert!(!deprecated("PUT", "/machine-config", machine));
    assert!(deprecated("PUT", "/machine-config", with_template));
    assert!(deprecated(
        "PATCH",
        "/machine-config",
        r#"{"cpu_template":"None"}"#
    ));
    assert!(!deprecated("PATCH", "/machine-config", r#"{"smt":false}"#));
    assert!(deprecated(
        "PUT",
        "/vsock",
        r#"{"guest_cid":3,"uds_path":"v","vsock_id":"a"}"#
    ));
    assert!(!deprecated(
        "PUT",
        "/vsock",
        r#"{"guest_cid":3,"uds_path":"v"}"#
    ));
    assert!(deprecated(
        "PUT",
        "/mmds/config",
        r#"{"network_interfaces":["a"]}"#
    ));
    assert!(!deprecated(
        "PUT",
        "/mmds/config",
        r#"{"network_interfaces":["a"],"version":"V2"}"#
    ));
}

#[test]
fn a_change_of_nothing_is_refused() {
    assert!(matches!(
        parse("PATCH", "/machine-config", b"{}"),
        Err(Refused::NoBody(_))
    ));
}

#[test]
fn hinting_needs_no_body_and_acknowledges_by_itself() {
    let start = |body: &str| {
        parse("PATCH", "/balloon/hinting/start", body.as_bytes())
            .unwrap()
            .call
    };
    let wanted = |acknowledge_on_stop| {
        Call::Vmm(VmmRequest::Update(
            "balloon".into(),
            DeviceUpdate::Balloon {
                amount_mib: None,
                stats_polling_interval_s: None,
                hinting: Some(Hinting::Start {
                    acknowledge_on_stop,
                }),
            },
        ))
    };
    assert_eq!(start(""), wanted(true));
    assert_eq!(start("{}"), wanted(true));
    assert_eq!(start(r#"{"acknowledge_on_stop":false}"#), wanted(false));
}

proptest! {
    #[test]
    fn any_body_at_any_path_is_taken_or_refused(at in 0..ROUTES.len(), body in any_json(".{0,12}", (4, 32, 6)), field in any::<prop::sample::Index>()) {
        let route = &ROUTES[at];
        let _ = parsed(route, &body);
        // And in place of a field, which gets further.
        if let Ok(Value::Object(mut example)) = serde_json::from_str::<Value>(route.example) {
            let names: Vec<_> = example.keys().cloned().collect();
            if !names.is_empty() {
                example.insert(field.get(&names).clone(), body);
                let _ = parsed(route, &Value::Object(example));
            }
        }
    }

    #[test]
    fn any_bytes_are_taken_or_refused(method in ".{0,8}", path in ".{0,40}", body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&method, &path, &body);
    }
}
