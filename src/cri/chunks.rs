//! Long lists in bounded messages: what the Stream* calls answer.

use std::pin::Pin;

use prost::Message;
use tokio_stream::Stream;
use tonic::{Response, Status};

use super::Reply;

/// Messages of one answer.
pub(super) type Streaming<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Bytes of the items of one message. Far below what a client takes, so that neither side ever holds a long list encoded.
const BYTES: usize = 512 << 10;
/// Items of one message.
const ITEMS: usize = 1000;

/// An answer with these items, in order, some in each message. No items: no message.
pub(super) fn chunked<I: Message + 'static, T: Send + 'static>(items: Vec<I>, message: fn(Vec<I>) -> T) -> Reply<Streaming<T>> {
    let messages: Vec<T> = chunks(items, BYTES, ITEMS).into_iter().map(message).collect();
    Ok(Response::new(Box::pin(tokio_stream::iter(messages.into_iter().map(Ok)))))
}

/// Chunks of at most so many bytes and items; one item that is larger is alone.
fn chunks<I: Message>(items: Vec<I>, bytes: usize, count: usize) -> Vec<Vec<I>> {
    let mut chunks: Vec<Vec<I>> = Vec::new();
    let mut room = 0;
    for item in items {
        let size = item.encoded_len();
        match chunks.last_mut() {
            Some(chunk) if size <= room && chunk.len() < count => {
                room -= size;
                chunk.push(item);
            }
            _ => {
                room = bytes.saturating_sub(size);
                chunks.push(vec![item]);
            }
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Image;

    #[test]
    fn chunks_are_bounded_and_lose_nothing() {
        let image = |n: usize, size: usize| Image { id: format!("{n:0size$}"), ..Image::default() };
        let check = |sizes: &[usize], want: &[usize]| {
            let items: Vec<Image> = sizes.iter().enumerate().map(|(n, size)| image(n, *size)).collect();
            let chunks = chunks(items.clone(), 1000, 4);
            assert_eq!(chunks.iter().map(Vec::len).collect::<Vec<_>>(), want, "{sizes:?}");
            assert_eq!(chunks.concat(), items);
        };
        check(&[], &[]);
        check(&[10], &[1]);
        check(&[10; 9], &[4, 4, 1]);
        check(&[400, 400, 400, 10], &[2, 2]);
        check(&[10, 5000, 10], &[1, 1, 1]);
    }
}
