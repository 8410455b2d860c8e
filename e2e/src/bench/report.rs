//! Results for people: progress, medians with spread and ratios, a Markdown table.

mod figures;
mod markdown;
mod text;

pub use markdown::markdown;
pub use text::{line, text};

/// The middle one; the mean of the two in the middle of an even number.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let high = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { high } else { f64::midpoint(sorted[middle - 1], high) })
}

/// A number with three or four digits that mean something.
fn digits(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => {
            let text = format!("{value:.0}");
            let at = text.len() - 3;
            format!("{},{}", &text[..at], &text[at..])
        }
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_numbers() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in
            [(0.4213, "0.42"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1,234"), (112_500.0, "112,500")]
        {
            assert_eq!(digits(value), text);
        }
    }
}
