/** Errors of the software device, for its user. Never raised by what a driver does. */
import { VipsecError } from '../errors.ts';

/**
 * `SOCKET_IN_USE` (another process listens there), `SOCKET_NOT_A_SOCKET` (a file
 * is in the way), `LINK_FAILED` (the link cannot be set up), `ARENA_FULL` (no address space for more guest memory).
 */
export class DeviceError extends VipsecError {}
