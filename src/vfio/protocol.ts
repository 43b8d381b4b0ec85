/**
 * The messages of vfio-user, version 0.0, for both sides: layouts, encoders, decoders.
 *
 * Source: QEMU, `docs/interop/vfio-user.rst` (the text at libvfio-user differs); structures that it borrows from
 * linux/vfio.h are laid out as there. Offsets count from the end of the 16-byte header. Integers are in host byte
 * order, little-endian on every machine that this package runs on.
 *
 * A decoder takes the payload of one message, which the other side chose: whatever does not fit throws VfioError
 * `PROTOCOL`. Encoders return whole messages; the sender sets the id. `message-socket.ts` frames them.
 *
 * Left out: migration, dirty page logging, twin sockets, REGION_WRITE_MULTI, ioregionfds.
 */
export * from './protocol-device.ts';
export * from './protocol-io-fds.ts';
export * from './protocol-layout.ts';
export * from './protocol-memory.ts';
export * from './protocol-version.ts';
