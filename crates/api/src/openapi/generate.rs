//! Makes the description from the types, and holds it against the one that is checked in.

use super::routes::{self, Answer, ROUTES, Route, When};
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

fn document() -> Value {
    let settings = SchemaSettings::draft2020_12();
    let mut generator = settings
        .with(|s| s.definitions_path = "/components/schemas".into())
        .into_generator();
    let mut paths = Map::new();
    for route in ROUTES {
        let operation = operation(route, &mut generator);
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.to_lowercase()] = operation;
    }
    routes::event(&mut generator);
    let schemas = generator.take_definitions(true);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Husk",
            "description": "Firecracker's API, and Husk's own below /husk/, over a Unix socket.",
            "version": crate::FIRECRACKER_VERSION,
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "http://localhost" }],
        "paths": paths,
        "components": { "schemas": schemas },
    })
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let when = match route.when {
        When::Any => "Before and after boot.",
        When::BeforeBoot => "Before boot.",
        When::AfterBoot => "After boot.",
        When::Never => "Answers 400.",
    };
    let fault =
        json!({ "application/json": { "schema": generator.subschema_for::<routes::Error>() } });
    let mut responses = json!({
        "400": { "description": "It is refused, and nothing has changed", "content": fault },
    });
    match &route.answer {
        _ if route.when == When::Never => {}
        None => responses["204"] = json!({ "description": "Done" }),
        Some(Answer::Json(schema)) => {
            let schema = schema(generator);
            responses["200"] = json!({
                "description": "What was asked for",
                "content": { "application/json": { "schema": schema } },
            });
        }
        Some(Answer::Text(kind)) => {
            responses["200"] =
                json!({ "description": "What was asked for", "content": { *kind: {} } });
        }
    }
    if route.path == "/mmds" && route.method != "GET" {
        responses["413"] = json!({ "description": "More than the store takes", "content": fault });
    }
    let mut operation = json!({
        "summary": route.summary,
        "description": when,
        "responses": responses,
    });
    if route.path.contains("{id}") {
        operation["parameters"] = json!([{
            "name": "id", "in": "path", "required": true,
            "schema": { "type": "string", "pattern": "^[A-Za-z0-9_]{1,64}$" },
        }]);
    }
    if let Some(body) = route.body {
        let schema = body(generator);
        operation["requestBody"] = json!({
            "required": route.path != "/balloon/hinting/start",
            "content": { "application/json": { "schema": schema } },
        });
    }
    operation
}

#[test]
fn the_document_that_is_checked_in_is_the_types() {
    let text = serde_json::to_string_pretty(&document()).unwrap() + "\n";
    let checked_in = include_str!("../../../../resources/openapi.json");
    if std::env::var_os("HUSK_UPDATE_OPENAPI").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../resources/openapi.json");
        std::fs::write(path, &text).unwrap();
        return;
    }
    assert!(
        text == checked_in,
        "resources/openapi.json has drifted from the types: run \
         `HUSK_UPDATE_OPENAPI=1 cargo test -p husk-api openapi` and look at the difference"
    );
}
