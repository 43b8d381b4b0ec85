/** The echo server behind the taps of a machine: `node echo.js`, until it is killed. */
import { serveEcho } from '../ipsec/echo.ts';

serveEcho();
