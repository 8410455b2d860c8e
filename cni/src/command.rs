//! Which command it is, and what all of them share: versions, modes, what meshd's refusals mean to a runtime.

use mesh_protocol::local::{LocalErrorCode, LocalReply, LocalRequest};

use crate::client::{self, ClientError};
use crate::input::{self, Config, Mode, Version};
use crate::reply::{self, Failure, FailureCode};
use crate::{attach, check, collect, detach};

/// What an error says when no version could be read.
const FALLBACK_VERSION: Version = Version::V1_1_0;

/// Does what the environment and standard input ask for. Gives the version to answer in, as it was asked for, and the
/// text for standard output, which may be empty.
pub(crate) fn answer() -> (String, Result<String, Failure>) {
    let fallback = FALLBACK_VERSION.to_string();
    let command = match input::variable("CNI_COMMAND") {
        Ok(command) => command,
        Err(failure) => return (fallback, Err(failure)),
    };
    let text = match input::read_config(std::io::stdin().lock()) {
        Ok(text) => text,
        Err(failure) => return (fallback, Err(failure)),
    };
    // Old runtimes send nothing at all with VERSION.
    if command == "VERSION" && text.trim().is_empty() {
        return (fallback.clone(), Ok(reply::versions(&fallback)));
    }
    match input::asked_version(&text) {
        Ok(asked) if command == "VERSION" => (asked.clone(), Ok(reply::versions(&asked))),
        Ok(asked) => {
            let outcome = Version::parse(&asked).and_then(|version| run(&command, version, &text));
            (asked, outcome)
        }
        Err(failure) => (fallback, Err(failure)),
    }
}

fn run(command: &str, version: Version, text: &str) -> Result<String, Failure> {
    match command {
        "ADD" => add(version, &Config::parse(text)?),
        "DEL" => {
            let attachment = input::attachment()?;
            let config = Config::parse(text)?;
            if config.mode == Mode::Primary {
                detach::detach(&attachment, &config)?;
            }
            Ok(String::new())
        }
        "CHECK" => {
            version.at_least(Version::V0_4_0, command)?;
            let (attachment, netns) = (input::attachment()?, input::netns_path()?);
            let config = Config::parse(text)?;
            match config.mode {
                Mode::Primary => check::check(&attachment, &netns, &config)?,
                Mode::Chained => ready(&config)?,
            }
            Ok(String::new())
        }
        "STATUS" => {
            version.at_least(Version::V1_1_0, command)?;
            status(&Config::parse(text)?)?;
            Ok(String::new())
        }
        "GC" => {
            version.at_least(Version::V1_1_0, command)?;
            let config = Config::parse(text)?;
            let valid = config.valid_attachments()?;
            if config.mode == Mode::Primary {
                collect::collect(valid, &config)?;
            }
            Ok(String::new())
        }
        other => Err(input::wrong_variable("CNI_COMMAND", other, "it is none of ADD, DEL, CHECK, STATUS, GC, VERSION")),
    }
}

fn add(version: Version, config: &Config) -> Result<String, Failure> {
    let (attachment, netns) = (input::attachment()?, input::netns_path()?);
    let wrong = |message: &str| Failure::new(FailureCode::Config, message);
    match (config.mode, &config.previous) {
        (Mode::Primary, None) => Ok(attach::attach(attachment, &netns, config)?.to_json(version)),
        (Mode::Primary, Some(_)) => {
            Err(wrong("a plugin before mesh-cni gave a result: put mesh-cni first, or set \"mode\": \"chained\""))
        }
        (Mode::Chained, None) => {
            Err(wrong("mode is chained, but no plugin before gave a prevResult: put mesh-cni after the other plugin"))
        }
        (Mode::Chained, Some(previous)) => {
            ready(config)?;
            Ok(previous.get().to_owned())
        }
    }
}

/// Refuses with "try again" until meshd guards this host.
fn ready(config: &Config) -> Result<(), Failure> {
    match client::ask(&config.socket, &LocalRequest::AttachStatus) {
        Ok(LocalReply::Done) => Ok(()),
        Ok(_) => Err(unexpected()),
        // Another plugin hands out the addresses: our pool does not matter.
        Err(ClientError::Refused(error)) if error.code == LocalErrorCode::PoolExhausted => Ok(()),
        Err(error) => Err(failure(&error)),
    }
}

fn status(config: &Config) -> Result<(), Failure> {
    match client::ask(&config.socket, &LocalRequest::AttachStatus) {
        Ok(LocalReply::Done) => Ok(()),
        Ok(_) => Err(Failure { code: FailureCode::Limited, ..unexpected() }),
        Err(error @ ClientError::Refused(_)) => {
            let exhausted =
                matches!(&error, ClientError::Refused(inner) if inner.code == LocalErrorCode::PoolExhausted);
            let code = if exhausted { FailureCode::NotAvailable } else { FailureCode::Limited };
            Err(Failure::new(code, error.message()))
        }
        Err(error) => Err(Failure::new(FailureCode::Limited, error.message())),
    }
}

/// What it means to a runtime that meshd gave no good answer.
pub(crate) fn failure(error: &ClientError) -> Failure {
    let code = match error {
        ClientError::Unreachable(_) => FailureCode::TryAgain,
        ClientError::Malformed(_) => FailureCode::Meshd,
        ClientError::Refused(inner) => match inner.code {
            LocalErrorCode::NotReady | LocalErrorCode::PoolExhausted => FailureCode::TryAgain,
            LocalErrorCode::UnknownPod => FailureCode::UnknownContainer,
            LocalErrorCode::BadRequest
            | LocalErrorCode::NotPermitted
            | LocalErrorCode::UnknownNode
            | LocalErrorCode::Internal => FailureCode::Meshd,
        },
    };
    Failure::new(code, error.message())
}

/// meshd answered another question.
pub(crate) fn unexpected() -> Failure {
    Failure::new(FailureCode::Meshd, "meshd answered another question than was asked; are both of one version?")
}
