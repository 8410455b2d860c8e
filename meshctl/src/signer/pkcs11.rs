//! A key in a PKCS#11 token: Ed25519 by CKM_EDDSA (PKCS#11 3.0, section 2.3.14), named by a URI of RFC 7512.
//!
//! ```text
//! pkcs11:token=T;object=O?module-path=/PATH/LIB.so&pin-source=file:/PATH
//! ```
//!
//! `object` is the label of both halves of the key. Without a `pin-source` the PIN is in [`PIN_VARIABLE`].

use std::fs;
use std::path::PathBuf;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::eddsa::{EddsaParams, EddsaSignatureScheme};
use cryptoki::object::{Attribute, AttributeType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::types::AuthPin;
use mesh_protocol::key::VerifyKey;
use zeroize::Zeroizing;

use super::SignerError;

/// Holds the PIN.
pub(super) const PIN_VARIABLE: &str = "MESH_SIGNER_PIN";

/// An open session with the token, logged in.
#[derive(Debug)]
pub(super) struct Token {
    session: Session,
    key: ObjectHandle,
    /// Unloaded last.
    _module: Pkcs11,
}

impl Token {
    /// Loads the module, logs in and finds both halves of the key.
    pub(super) fn open(spec: &str) -> Result<(Self, VerifyKey), SignerError> {
        let uri = Uri::parse(spec)
            .map_err(|reason| SignerError::Spec { spec: spec.to_owned(), reason: reason.to_owned() })?;
        let module = Pkcs11::new(&uri.module).map_err(failed("cannot load the module"))?;
        module
            .initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))
            .map_err(failed("cannot start the module"))?;
        let session = uri.session(&module)?;
        session.login(UserType::User, Some(&uri.pin()?)).map_err(failed("cannot log in"))?;
        let label = Attribute::Label(uri.object.as_bytes().to_vec());
        let key = only(&session, &[Attribute::Class(ObjectClass::PRIVATE_KEY), label.clone()], &uri.object)?;
        let public = only(&session, &[Attribute::Class(ObjectClass::PUBLIC_KEY), label], &uri.object)?;
        let attributes =
            session.get_attributes(public, &[AttributeType::EcPoint]).map_err(failed("cannot read the public key"))?;
        let point = attributes.into_iter().find_map(|attribute| match attribute {
            Attribute::EcPoint(point) => Some(point),
            _ => None,
        });
        let public = point.as_deref().and_then(public_key);
        let public = public.ok_or_else(|| SignerError::Token(format!("'{}' is no Ed25519 key", uri.object)))?;
        Ok((Self { session, key, _module: module }, public))
    }

    pub(super) fn sign(&self, message: &[u8]) -> Result<[u8; 64], SignerError> {
        let mechanism = Mechanism::Eddsa(EddsaParams::new(EddsaSignatureScheme::Ed25519));
        let signature = self.session.sign(&mechanism, self.key, message).map_err(failed("does not sign"))?;
        signature.try_into().map_err(|_| SignerError::Token("its signature is not 64 bytes long".to_owned()))
    }
}

fn failed(what: &'static str) -> impl Fn(cryptoki::error::Error) -> SignerError {
    move |error| SignerError::Token(format!("{what}: {error}"))
}

fn only(session: &Session, template: &[Attribute], label: &str) -> Result<ObjectHandle, SignerError> {
    let found = session.find_objects(template).map_err(failed("cannot look for the key"))?;
    match found.as_slice() {
        [object] => Ok(*object),
        [] => Err(SignerError::Token(format!("there is no key '{label}' in it"))),
        _ => Err(SignerError::Token(format!("there is more than one key '{label}' in it"))),
    }
}

/// `CKA_EC_POINT`: the 32 bytes in a DER octet string, or, by older modules, bare.
fn public_key(point: &[u8]) -> Option<VerifyKey> {
    let bytes = match point {
        [0x04, 0x20, rest @ ..] => rest,
        bare => bare,
    };
    VerifyKey::from_bytes(bytes.try_into().ok()?).ok()
}

/// The parts of a URI that are used here; others are refused, because they would have meant something.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Uri {
    token: Option<String>,
    object: String,
    module: PathBuf,
    pin_file: Option<PathBuf>,
}

impl Uri {
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        let rest = text.strip_prefix("pkcs11:").ok_or("it does not begin with pkcs11:")?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (mut token, mut object, mut module, mut pin_file) = (None, None, None, None);
        let parts = path.split(';').chain(query.split('&')).filter(|part| !part.is_empty());
        for part in parts {
            let (name, value) = part.split_once('=').ok_or("a part of it has no value")?;
            let value = decode(value).ok_or("its percent encoding is wrong")?;
            match name {
                "token" => token = Some(value),
                "object" => object = Some(value),
                "module-path" => module = Some(PathBuf::from(value)),
                "pin-source" => pin_file = Some(PathBuf::from(value.strip_prefix("file:").unwrap_or(&value))),
                "type" if value == "private" => {}
                _ => return Err("only token, object, module-path and pin-source are understood"),
            }
        }
        let object = object.ok_or("it names no object")?;
        Ok(Self { token, object, module: module.ok_or("it names no module-path")?, pin_file })
    }

    fn session(&self, module: &Pkcs11) -> Result<Session, SignerError> {
        let slots = module.get_slots_with_initialized_token().map_err(failed("cannot list tokens"))?;
        let is_named = |slot: &cryptoki::slot::Slot| match &self.token {
            Some(name) => module.get_token_info(*slot).is_ok_and(|info| info.label() == name),
            None => true,
        };
        let named: Vec<_> = slots.into_iter().filter(is_named).collect();
        match named.as_slice() {
            [slot] => module.open_ro_session(*slot).map_err(failed("cannot open a session")),
            [] => Err(SignerError::Token("there is none of that name".to_owned())),
            _ => Err(SignerError::Token("there is more than one: name it with token=".to_owned())),
        }
    }

    fn pin(&self) -> Result<AuthPin, SignerError> {
        let text = match &self.pin_file {
            Some(path) => fs::read_to_string(path)
                .map_err(|error| SignerError::Token(format!("PIN file {}: {error}", path.display())))?,
            None => std::env::var(PIN_VARIABLE)
                .map_err(|_| SignerError::Token(format!("no PIN: give a pin-source, or set {PIN_VARIABLE}")))?,
        };
        let text = Zeroizing::new(text);
        Ok(AuthPin::new(text.trim_end().into()))
    }
}

/// RFC 3986, section 2.1.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = tail;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests;
